"""MCLIRModel: negatives from the network's own past (MCLIR, arXiv 2309.06023, AAAI 2024). It needs no teacher."""

from __future__ import annotations

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.kd_model import KDModel


@MODEL_REGISTRY.register()
class MCLIRModel(KDModel):
    """``L = L1(S(x), y) + L_neg``: the term of ``kdsr.terms.mclir``."""

    REQUIRED_TERMS = ("neg_opt",)
