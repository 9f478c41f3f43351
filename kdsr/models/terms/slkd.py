"""SLKD's comparisons as terms: natural scenes in the encoder, edges and texture in the decoder, places in the image.

"Knowledge Distillation for Image Restoration: Simultaneous Learning from Degraded and Clean Images" (SLKD, arXiv
2501.09268, 2025). Both extractors and the module that matches channels are our reading (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.losses.slkd_loss import EdgeTextureLoss, NaturalSceneLoss
from kdsr.models.adapters import TapGroup, resized_like
from kdsr.models.pretrained import weight_files
from kdsr.models.tap_options import missing_taps, tap_pairs, tap_problems
from kdsr.models.terms.features import loss_problems
from kdsr.models.terms.term import Term

_TAPS = (list, dict, type(None))


class SpatialKLTerm(Term):
    """``l_kl``: the student's output is bright where the teacher's is (``SpatialKLLoss``)."""

    KEY = "kl_opt"
    TRAIN_KEYS = {KEY: (dict, type(None))}
    NEEDS = frozenset({"teacher"})

    def losses(self, current_iter: int, taught: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"l_kl": self.cri(self.model.output, self.model.teacher_output)}


class _LevelsTerm(Term):
    """Compares features of levels, which have an option of their own.

    Attributes:
        TAPS: That option, of ``train``.
        LOSS: What compares them.
        TEACHER: The key of the network whose features they are compared with; ``t`` where it is not given.
    """

    TAPS: ClassVar[str]
    LOSS: ClassVar[type[nn.Module]]
    TEACHER: ClassVar[str] = "t"

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        taps = opt["train"].get(cls.TAPS)
        if not taps:
            missing = [missing_taps(opt, cls.TAPS, [cls.KEY], cls.TEACHER)]
        else:
            missing = tap_problems(taps, f"train.{cls.TAPS}")
        return loss_problems(opt, cls.KEY, cls.LOSS) + missing

    def teacher(self) -> nn.Module:
        """The one whose features are compared with."""
        assert self.model.net_t is not None
        return self.model.net_t

    def tap_groups(self) -> dict[str, TapGroup]:
        pairs = tap_pairs(self.model.opt["train"][self.TAPS])
        return {self.KEY: TapGroup(f"train.{self.TAPS}", pairs, self.teacher())}

    def like(self, wanted: Sequence[Tensor]) -> list[Tensor]:
        """The student's adapted features in the shapes of the teacher's, level by level."""
        assert self.model.student_bundle is not None
        return resized_like(self.model.student_bundle.features[self.KEY], wanted)


class NaturalSceneTerm(_LevelsTerm):
    """``l_nc``: at ``encoder_taps``, natural scene statistics as in Teacher A, which sees the degraded images."""

    KEY, TAPS, LOSS = "nc_opt", "encoder_taps", NaturalSceneLoss
    TRAIN_KEYS = {KEY: (dict, type(None)), TAPS: _TAPS}
    NEEDS = frozenset({"teacher"})

    def losses(self, current_iter: int, taught: Sequence[Tensor]) -> dict[str, Tensor]:
        wanted = self.model.taught_features(self.KEY)
        return {"l_nc": self.cri(self.like(wanted), wanted)}


class EdgeTextureTerm(_LevelsTerm):
    """``l_et``: at ``decoder_taps``, edges and texture as in Teacher B, which sees the clean images.

    Teacher B has its own checkpoint where ``network_tb`` is given; else it is Teacher A, shown the ground truth. That
    is a pass of its own after all others of Teacher A, whose features must have been taken by then: the last of terms.
    """

    KEY, TAPS, LOSS, TEACHER = "et_opt", "decoder_taps", EdgeTextureLoss, "tb"
    TRAIN_KEYS = {KEY: (dict, type(None)), TAPS: _TAPS}
    NETWORK_KEYS = frozenset({"tb"})
    NEEDS = frozenset({"teacher", "gt"})

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        problems = super().problems(opt)
        if opt.get("scale", 1) != 1:
            problems.append(
                f"scale: train.{cls.KEY} shows Teacher B the clean image in place of the degraded one, so they must be "
                f"of one size: set 1, not {opt['scale']}"
            )
        if opt.get("network_tb") and "tb" not in weight_files(opt):
            problems.append(
                "path.pretrain_network_tb: missing; a Teacher B with random weights has nothing to teach"
            )
        return problems

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if model.opt.get("network_tb"):
            model.net_tb = model.build_frozen("tb")
        else:
            get_root_logger().info("net_tb: Teacher A, which is shown the clean images")
            model.net_tb = model.net_t

    def teacher(self) -> nn.Module:
        assert self.model.net_tb is not None
        return self.model.net_tb

    def losses(self, current_iter: int, taught: Sequence[Tensor]) -> dict[str, Tensor]:
        wanted = self.of_clean()
        strides = [max(1, round(self.model.gt.shape[-1] / level.shape[-1])) for level in wanted]
        return {"l_et": self.cri(self.like(wanted), wanted, strides)}

    @torch.no_grad()
    def of_clean(self) -> list[Tensor]:
        """Teacher B's features of the ground truth."""
        assert self.model.student_bundle is not None
        self.teacher()(self.model.gt)
        return self.model.student_bundle.teacher_taps[self.KEY].take(self.model.gt)
