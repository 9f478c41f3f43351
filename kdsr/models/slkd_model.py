"""SLKDModel: the encoder learns from degraded images, the decoder from clean ones (SLKD, arXiv 2501.09268, 2025).

Both extractors and the module that matches channels are our reading of the paper (docs/methods.md).
"""

from __future__ import annotations

from typing import Any

import torch
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from kdsr.models.adapters import TapGroup, resized_like
from kdsr.models.kd_model import KDModel
from kdsr.models.pretrained import weight_files
from kdsr.models.tap_options import tap_pairs, tap_problems

# what is compared where: term of the loss -> its features
LEVELS = {"nc_opt": "encoder_taps", "et_opt": "decoder_taps"}


@MODEL_REGISTRY.register()
class SLKDModel(KDModel):
    """``L = L1(S(x), y) + L1(S(x), T_A(x)) + KL + L_NC + L_ET``, each with its weight; for encoder-decoder networks.

    Degradation removal: the student's encoder features are drawn to those of Teacher A (``net_t``), which sees the
    degraded image x, in their BRISQUE statistics (L_NC). Reconstruction: its decoder features are drawn to those of
    Teacher B (``net_tb``), which sees the clean image y, in edges and texture as PIQE finds them (L_ET). The student's
    features pass trainable 1×1 convolutions (the paper's scale conversion module).

    Teacher B has its own checkpoint where ``network_tb`` is given; else it is Teacher A, shown y.

    Options (``train``): ``logits_opt`` → ``l_ts``; ``kl_opt`` (``SpatialKLLoss``) → ``l_kl``; ``nc_opt``
    (``NaturalSceneLoss``) → ``l_nc`` at ``encoder_taps``; ``et_opt`` (``EdgeTextureLoss``) → ``l_et`` at
    ``decoder_taps``. Taps are ``[{student: encoders.0, teacher: encoders.0}, ...]``, the level of full size first.
    """

    TRAIN_KEYS: dict[str, Any] = {
        "kl_opt": (dict, type(None)),
        "nc_opt": (dict, type(None)),
        "et_opt": (dict, type(None)),
        "encoder_taps": (list, dict, type(None)),
        "decoder_taps": (list, dict, type(None)),
    }
    NETWORK_KEYS = frozenset({"tb"})
    GT_KEYS = frozenset({"et_opt"})  # Teacher B looks at it

    @classmethod
    def check_options(cls, opt: dict[str, Any]) -> list[str]:
        train = opt.get("train") or {}
        problems = super().check_options(opt)
        if not opt.get("network_t"):
            problems.append("network_t: missing; SLKDModel needs Teacher A, which sees the degraded images")
        if opt.get("scale", 1) != 1:
            problems.append(
                f"scale: SLKDModel shows Teacher B the clean image in place of the degraded one, so they must be of "
                f"one size: set 1, not {opt['scale']}"
            )
        if opt.get("network_tb") and "tb" not in weight_files(opt):
            problems.append(
                "path.pretrain_network_tb: missing; a Teacher B with random weights has nothing to teach"
            )
        for loss, taps in LEVELS.items():
            if train.get(loss) and not train.get(taps):
                problems.append(f"train.{taps}: missing, train.{loss} needs it")
            elif train.get(taps):
                problems += tap_problems(train[taps], f"train.{taps}")
        return problems

    net_tb: nn.Module

    def build_training_networks(self) -> None:
        super().build_training_networks()
        assert self.net_t is not None
        if self.opt.get("network_tb"):
            self.net_tb = self.build_frozen("tb")
        else:
            get_root_logger().info("net_tb: Teacher A, which is shown the clean images")
            self.net_tb = self.net_t

    def tap_groups(self) -> dict[str, TapGroup]:
        assert self.net_t is not None
        train, teachers = self.opt["train"], {"nc_opt": self.net_t, "et_opt": self.net_tb}
        ours = {
            loss: TapGroup(f"train.{taps}", tap_pairs(train[taps]), teachers[loss])
            for loss, taps in LEVELS.items()
            if train.get(loss)
        }
        return {**super().tap_groups(), **ours}

    def build_losses(self, train_opt: dict[str, Any]) -> None:
        super().build_losses(train_opt)
        self.cri_kl = self.build_loss("kl_opt")
        self.cri_nc = self.build_loss("nc_opt")
        self.cri_et = self.build_loss("et_opt")

    def compute_losses(self, current_iter: int) -> dict[str, Tensor]:
        losses = super().compute_losses(current_iter)
        if self.cri_kl:
            losses["l_kl"] = self.cri_kl(self.output, self.teacher_output)
        if self.cri_nc:
            student, teacher = self.compared("nc_opt")
            losses["l_nc"] = self.cri_nc(student, teacher)
        if self.cri_et:
            self.show_clean()
            student, teacher = self.compared("et_opt")
            strides = [max(1, round(self.gt.shape[-1] / level.shape[-1])) for level in teacher]
            losses["l_et"] = self.cri_et(student, teacher, strides)
        return losses

    def compared(self, group: str) -> tuple[list[Tensor], list[Tensor]]:
        """The student's adapted features and a teacher's, of the same shapes, level by level."""
        assert self.student_bundle is not None
        teacher = self.taught_features(group)
        return resized_like(self.student_bundle.features[group], teacher), teacher

    @torch.no_grad()
    def show_clean(self) -> None:
        """Teacher B looks at the ground truth; only its features count."""
        self.net_tb(self.gt)
