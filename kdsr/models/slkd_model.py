"""SLKDModel: the encoder learns from degraded images, the decoder from clean ones (SLKD, arXiv 2501.09268, 2025)."""

from __future__ import annotations

from typing import Any

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.kd_model import KDModel


@MODEL_REGISTRY.register()
class SLKDModel(KDModel):
    """``L = L1(S(x), y) + L1(S(x), T_A(x)) + KL + L_NC + L_ET``, each with its weight; for encoder-decoder networks.

    Degradation removal: the student's encoder features are drawn to those of Teacher A (``net_t``), which sees the
    degraded image x, in their BRISQUE statistics (L_NC). Reconstruction: its decoder features are drawn to those of
    Teacher B (``net_tb``), which sees the clean image y, in edges and texture as PIQE finds them (L_ET). The student's
    features pass trainable 1×1 convolutions (the paper's scale conversion module).

    KDModel with the terms ``kl_opt`` → ``l_kl``, ``nc_opt`` → ``l_nc`` at ``encoder_taps`` and ``et_opt`` → ``l_et`` at
    ``decoder_taps`` (``kdsr.models.terms.slkd``), of which it wants one at least; taps are
    ``[{student: encoders.0, teacher: encoders.0}, ...]``. Any other model takes the terms as well.
    """

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        train = opt.get("train") or {}
        problems = super().check_options(opt)
        if not any(train.get(key) for key in ("kl_opt", "nc_opt", "et_opt")):
            problems.append(
                "train: SLKDModel has none of kl_opt, nc_opt and et_opt; give one, or use KDModel"
            )
        return problems
