"""SLKD's terms: natural scene statistics in the encoder, edges and texture in the decoder, spatial distributions.

"Knowledge Distillation for Image Restoration: Simultaneous Learning from Degraded and Clean Images" (SLKD, arXiv
2501.09268, 2025). Both extractors and the module that matches channels are our interpretation (docs/methods.md).
"""

from __future__ import annotations

from typing import Any, ClassVar

from basicsr.utils import get_root_logger
from torch import Tensor

from kdsr.distill.adapters import TapGroup, resized_like
from kdsr.distill.step import Step
from kdsr.distill.tap_options import missing_taps, tap_pairs, tap_problems
from kdsr.distill.term import TERM_REGISTRY, Setup, Term
from kdsr.distill.weight_files import weight_files
from kdsr.losses.slkd_loss import EdgeTextureLoss, NaturalSceneLoss
from kdsr.runtime.declarations import Network, Options, Section, loss, option
from kdsr.terms.features import PAIRS

CLEAN = "clean"  # the teacher's view of the ground truth


class SpatialKLOptions(Options):
    kl_opt: Section | None = loss(
        "Spatial distribution of each channel's intensity (`SpatialKLLoss`), against the teacher's output, `l_kl`."
    )


@TERM_REGISTRY.register()
class SpatialKLTerm(Term):
    """``l_kl``: divergence of the outputs' spatial distributions of intensity (``SpatialKLLoss``)."""

    KEY = "kl_opt"
    options = SpatialKLOptions
    NEEDS = frozenset({"teacher_output"})

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"l_kl": self.loss(step.output, step.teacher_output)}


class _LevelsTerm(Term):
    """Compares features at taps of a separate option.

    Attributes:
        TAPS: The option of ``train`` with the taps.
        TEACHER: The key of the teacher network; if it is not given, ``t`` is used.
    """

    TAPS: ClassVar[str]
    TEACHER: ClassVar[str] = "t"

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        taps = opt["train"].get(cls.TAPS)
        if not taps:
            return [missing_taps(opt, cls.TAPS, [cls.KEY], cls.TEACHER)]
        return tap_problems(taps, f"train.{cls.TAPS}")

    def tap_groups(self) -> dict[str, TapGroup]:
        return {self.KEY: TapGroup(f"train.{self.TAPS}", tap_pairs(getattr(self.options, self.TAPS)))}

    def levels(self, step: Step) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the student's adapted features, resized to the teacher's, and the teacher's features."""
        targets = step.teacher_features[self.KEY]
        return resized_like(step.student_features[self.KEY], targets), targets


class NaturalSceneOptions(Options):
    nc_opt: Section | None = loss(
        "Natural scene statistics of encoder features, against Teacher A's, `l_nc`.", NaturalSceneLoss
    )
    encoder_taps: list | Section | None = option(None, f"Features of `nc_opt`: {PAIRS}.")


@TERM_REGISTRY.register()
class NaturalSceneTerm(_LevelsTerm):
    """``l_nc``: natural scene statistics at ``encoder_taps`` against Teacher A, which gets the degraded images."""

    KEY, TAPS = "nc_opt", "encoder_taps"
    options = NaturalSceneOptions
    NEEDS = frozenset({"teacher"})

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"l_nc": self.loss(*self.levels(step))}


class EdgeTextureOptions(Options):
    et_opt: Section | None = loss(
        "Edges and texture of decoder features, against Teacher B's, `l_et`.", EdgeTextureLoss
    )
    decoder_taps: list | Section | None = option(None, f"Features of `et_opt`: {PAIRS}.")


@TERM_REGISTRY.register()
class EdgeTextureTerm(_LevelsTerm):
    """``l_et``: edges and texture at ``decoder_taps`` against Teacher B, which gets the clean images.

    Teacher B is ``network_tb``; without it, Teacher A also gets the ground truth, batched with the degraded images.
    """

    KEY, TAPS, TEACHER = "et_opt", "decoder_taps", "tb"
    options = EdgeTextureOptions
    NETWORKS = {
        "tb": Network("Teacher B of `et_opt`, which gets the clean images; without it, Teacher A is used.")
    }
    NEEDS = frozenset({"teacher", "gt"})

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        problems = super().problems(opt)
        if opt.get("scale", 1) != 1:
            problems.append(
                f"scale: train.{cls.KEY} gives Teacher B the clean image instead of the degraded one, so both must "
                f"have the same size: set 1, not {opt['scale']}"
            )
        if opt.get("network_tb") and "tb" not in weight_files(opt):
            problems.append("path.pretrain_network_tb: missing; a Teacher B with random weights is of no use")
        return problems

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.teacher = "tb" if setup.opt.get("network_tb") else "t"
        if self.teacher == "t":
            get_root_logger().info("net_tb: Teacher A, which also gets the clean images")

    def tap_groups(self) -> dict[str, TapGroup]:
        (group,) = super().tap_groups().values()
        return {self.KEY: group._replace(teacher=self.teacher, view=CLEAN)}

    def prepare(self, step: Step) -> None:
        step.show_teacher(CLEAN, step.ground_truth, self.teacher)

    def losses(self, step: Step) -> dict[str, Tensor]:
        features, targets = self.levels(step)
        strides = [max(1, round(step.ground_truth.shape[-1] / level.shape[-1])) for level in targets]
        return {"l_et": self.loss(features, targets, strides)}
