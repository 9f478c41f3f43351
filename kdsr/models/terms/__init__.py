"""The terms that any KDModel can have, see ``term``."""

from __future__ import annotations

from kdsr.models.terms.csd import CSDTerm
from kdsr.models.terms.dukd import ZoomInTerm, ZoomOutTerm
from kdsr.models.terms.features import ATTerm, FAKDTerm, FitNetTerm, RKDTerm
from kdsr.models.terms.term import Term

TERMS: tuple[type[Term], ...] = (
    ZoomInTerm,
    ZoomOutTerm,
    FitNetTerm,
    ATTerm,
    FAKDTerm,
    RKDTerm,
    CSDTerm,
)
