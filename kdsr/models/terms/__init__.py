"""The terms that any KDModel can have, see ``term``."""

from __future__ import annotations

from kdsr.models.terms.csd import CSDTerm
from kdsr.models.terms.dukd import ZoomInTerm, ZoomOutTerm
from kdsr.models.terms.facd import FACDTerm
from kdsr.models.terms.features import ATTerm, FAKDTerm, FitNetTerm, RKDTerm
from kdsr.models.terms.slkd import EdgeTextureTerm, NaturalSceneTerm, SpatialKLTerm
from kdsr.models.terms.term import Term

TERMS: tuple[type[Term], ...] = (
    ZoomInTerm,
    ZoomOutTerm,
    FitNetTerm,
    ATTerm,
    FAKDTerm,
    RKDTerm,
    CSDTerm,
    FACDTerm,
    SpatialKLTerm,
    NaturalSceneTerm,
    EdgeTextureTerm,  # the last: Teacher A's features are those of x until it is shown something else
)
