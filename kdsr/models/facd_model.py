"""FACDModel: contrast between features, as far as the student can accept it (FACD, arXiv 2211.15951, 2023)."""

from __future__ import annotations

from typing import Any

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.kd_model import KDModel


@MODEL_REGISTRY.register()
class FACDModel(KDModel):
    """``L = L1(S(x), y) + L1(S(x), T(x)) + mean_j FACD_j``: logits KD, and at each tap j a contrast of features.

    KDModel with the term ``facd_opt`` (``kdsr.models.terms.facd``), without which it does not start. Any other model
    takes the term as well.
    """

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        problems = super().check_options(opt)
        if not (opt.get("train") or {}).get("facd_opt"):
            problems.append("train.facd_opt: missing; give {type: FACDLoss}, or use KDModel")
        return problems
