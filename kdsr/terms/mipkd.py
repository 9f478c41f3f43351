"""MiPKD's two terms: mixtures of features and of blocks (arXiv 2404.02573, ICLR 2025).

No code was released; the mixers are our interpretation of the paper's summary (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdsr.distill.adapters import TapGroup
from kdsr.distill.step import Step
from kdsr.distill.tap_options import missing_taps, tap_pairs, tap_problems
from kdsr.distill.term import TERM_REGISTRY, Setup, Shapes, Term
from kdsr.losses.fitnet_loss import FitNetLoss
from kdsr.runtime.declarations import Options, Section, loss, option
from kdsr.runtime.precision import dtypes_of
from kdsr.terms.features import PAIRS, TapOptions
from kdsr.terms.mipkd_mixers import BlockMixing, FeatureMixing, draw_mask

FEATURES, BLOCKS = "feature_mixing", "block_mixing"


class FeatureMixingOptions(TapOptions):
    fm_opt: Section | None = loss("The teacher's features, decoded from mixtures, `l_fm`.", FitNetLoss)
    fm_aux_opt: Section | None = loss(
        "The teacher's features, decoded from its own latents, `l_fm_aux`.", FitNetLoss
    )
    mix_ratio: float = option(
        0.5, "Probability that an element of a mixture is the teacher's.", lowest=0, highest=1
    )


class BlockMixingOptions(Options):
    bm_opt: Section | None = loss("Loss of the mixed network against the teacher's output, `l_bm`.")
    blocks: list | Section | None = option(
        None, f"Blocks of the student and the teacher's blocks that may replace them: {PAIRS}."
    )
    block_ratio: float = option(
        0.5, "Probability that a block is the teacher's, drawn for each block and step.", lowest=0, highest=1
    )


@TERM_REGISTRY.register()
class FeatureMixingTerm(Term):
    """``l_fm = ‖D(M ⊙ E_T(F_T) + (1 − M) ⊙ E_S(F_S)) − F_T‖_1`` at the ``taps`` (``FitNetLoss``).

    Student and teacher features are encoded to latents of the teacher's width and mixed at random, element by element.
    A decoder reconstructs the teacher's feature. ``fm_aux_opt`` also trains the decoder on the teacher's latent,
    ``l_fm_aux = ‖D(E_T(F_T)) − F_T‖_1``.
    """

    KEY = "fm_opt"
    options = FeatureMixingOptions
    NEEDS = frozenset({"teacher", "taps"})

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.auxiliary_loss = setup.loss("fm_aux_opt")
        self.ratio = self.options.mix_ratio

    def tap_groups(self) -> dict[str, TapGroup]:
        return {FEATURES: TapGroup("train.taps", tap_pairs(self.options.taps), adapt=False)}

    def passes(self, shapes: Mapping[str, Shapes]) -> dict[str, nn.Module]:
        ours, theirs = zip(*shapes[FEATURES], strict=True)
        return {FEATURES: FeatureMixing(FEATURES, ours, theirs)}

    def before_student(self, step: Step) -> None:
        features = step.teacher_features[FEATURES]
        seeds = torch.randint(2**62, (len(features),), generator=step.generator).tolist()
        masks = [
            draw_mask(feature.shape, self.ratio, seed, self.setup.device)
            for feature, seed in zip(features, seeds, strict=True)
        ]
        step.student_inputs[FEATURES] = (features, masks)

    def losses(self, step: Step) -> dict[str, Tensor]:
        mixtures, own = step.results[FEATURES]
        targets = step.teacher_features[FEATURES]
        losses = {"l_fm": self.loss(mixtures, targets)}
        if self.auxiliary_loss:
            losses["l_fm_aux"] = self.auxiliary_loss(own, targets)
        return losses


@TERM_REGISTRY.register()
class BlockMixingTerm(Term):
    """``l_bm = ‖out_mixed − T(x)‖_1``: a second pass of the student with random blocks replaced by the teacher's."""

    KEY = "bm_opt"
    options = BlockMixingOptions
    NEEDS = frozenset({"teacher", "teacher_output"})
    COMPARES_IMAGES = True

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        blocks = opt["train"].get("blocks")
        if blocks is None:
            return [missing_taps(opt, "blocks", [cls.KEY])]
        if opt["train"].get("checkpoint_student"):
            return [
                f"train.checkpoint_student: train.{cls.KEY} replaces blocks of the student; set it to false"
            ]
        precision = dtypes_of(opt.get("precision"), on_cpu=False)
        if precision["teacher"] not in (None, precision["student"]):
            return [
                f"precision.teacher: train.{cls.KEY} puts the teacher's blocks into the student; set both alike"
            ]
        return tap_problems(blocks, "train.blocks", "blocks")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.pairs = tap_pairs(self.options.blocks)
        self.ratio = self.options.block_ratio

    def passes(self, shapes: Mapping[str, Shapes]) -> dict[str, nn.Module]:
        student, teacher = self.setup.student, self.setup.frozen("t")
        return {BLOCKS: BlockMixing("train.blocks", self.pairs, student, teacher, self.setup.sample_lq())}

    def prepare(self, step: Step) -> None:
        taken = (torch.rand(len(self.pairs), generator=step.generator) < self.ratio).tolist()
        step.student_inputs[BLOCKS] = (step.lq, taken)

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"l_bm": self.loss(step.results[BLOCKS].to(step.lq.dtype), step.teacher_output)}
