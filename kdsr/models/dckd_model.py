"""DCKDModel: dynamic contrastive regularisation and distribution mapping (DCKD, arXiv 2412.08939, AAAI 2025)."""

from __future__ import annotations

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.kd_model import KDModel


@MODEL_REGISTRY.register()
class DCKDModel(KDModel):
    """``L = L_rec + L_kd [+ L_lcr] + L_dcl + L_ce`` (Eq. 10): the terms of ``kdsr.terms.dckd`` beside logits KD."""

    REQUIRED_TERMS = ("cl_opt", "ce_opt")
