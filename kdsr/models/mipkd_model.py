"""MiPKDModel: mixtures of the student's and the teacher's features and blocks (MiPKD, arXiv 2404.02573, ICLR 2025)."""

from __future__ import annotations

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.kd_model import KDModel


@MODEL_REGISTRY.register()
class MiPKDModel(KDModel):
    """``L = L1(S(x), y) + L1(S(x), T(x)) + L_fm + L_fm_aux + 0.1 · L_bm``: the terms of ``kdsr.terms.mipkd``."""

    REQUIRED_TERMS = ("fm_opt", "bm_opt")
