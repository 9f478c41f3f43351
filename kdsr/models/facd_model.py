"""FACDModel: contrast between features, as far as the student can accept it (FACD, arXiv 2211.15951, 2023)."""

from __future__ import annotations

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.kd_model import KDModel


@MODEL_REGISTRY.register()
class FACDModel(KDModel):
    """``L = L1(S(x), y) + L1(S(x), T(x)) + mean_j FACD_j``: logits KD and the term of ``kdsr.terms.facd``."""

    REQUIRED_TERMS = ("facd_opt",)
