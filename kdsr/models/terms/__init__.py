"""The terms that any KDModel can have, see ``term``."""

from __future__ import annotations

from kdsr.models.terms.dukd import ZoomInTerm, ZoomOutTerm
from kdsr.models.terms.term import Term

TERMS: tuple[type[Term], ...] = (ZoomInTerm, ZoomOutTerm)
