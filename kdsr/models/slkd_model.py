"""SLKDModel: the encoder learns from degraded images, the decoder from clean ones (SLKD, arXiv 2501.09268, 2025)."""

from __future__ import annotations

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.kd_model import KDModel


@MODEL_REGISTRY.register()
class SLKDModel(KDModel):
    """``L = L1(S(x), y) + L1(S(x), T_A(x)) + KL + L_NC + L_ET``, for encoder-decoder networks.

    Degradation removal: the student's encoder features are drawn to those of Teacher A (``network_t``), which sees the
    degraded image x, in their BRISQUE statistics (L_NC). Reconstruction: its decoder features are drawn to those of
    Teacher B (``network_tb``), which sees the clean image y, in edges and texture as PIQE finds them (L_ET). The terms
    are those of ``kdsr.terms.slkd``.
    """

    REQUIRED_TERMS = ("kl_opt", "nc_opt", "et_opt")
