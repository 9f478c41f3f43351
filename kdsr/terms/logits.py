"""What a student learns from images: the ground truth, the teacher's output, and the teacher's second opinion."""

from __future__ import annotations

from torch import Tensor

from kdsr.distill.step import Step
from kdsr.distill.term import TERM_REGISTRY, Setup, Term
from kdsr.runtime.declarations import Options, Section, loss
from kdsr.terms.label_consistency import AugmentationOptions, LabelConsistency


class PixelOptions(Options):
    pixel_opt: Section | None = loss("Loss against the ground truth, `l_pix`.")


@TERM_REGISTRY.register()
class PixelTerm(Term):
    """``l_pix = L1(S(x), y)``, or any other pixel loss."""

    KEY = "pixel_opt"
    options = PixelOptions
    NEEDS = frozenset({"gt"})
    COMPARES_IMAGES = True

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"l_pix": self.loss(step.output, step.ground_truth)}


class LogitsOptions(Options):
    logits_opt: Section | None = loss("Loss against the teacher's output, `l_ts`.")


@TERM_REGISTRY.register()
class LogitsTerm(Term):
    """``l_ts = L1(S(x), T(x))``: response distillation (Hinton et al., 2015, with images in place of logits)."""

    KEY = "logits_opt"
    options = LogitsOptions
    NEEDS = frozenset({"teacher_output"})
    COMPARES_IMAGES = True

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"l_ts": self.loss(step.output, step.teacher_output)}


class LabelConsistencyOptions(AugmentationOptions):
    lcr_opt: Section | None = loss("Label consistency, `l_lcr`.")


@TERM_REGISTRY.register()
class LabelConsistencyTerm(Term):
    """``l_lcr = L1(S(x), A⁻¹ T(A x))`` of DCKD's release: A inverts colours, flips and transposes at random."""

    KEY = "lcr_opt"
    options = LabelConsistencyOptions
    NEEDS = frozenset({"teacher"})
    COMPARES_IMAGES = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.augmentation = LabelConsistency(self.options.noisy.prob)

    def prepare(self, step: Step) -> None:
        plan = self.augmentation.draw(len(step.lq), step.generator)
        step.kept[self.KEY] = plan
        step.show_teacher("augmented", self.augmentation.apply(step.lq, plan))

    def losses(self, step: Step) -> dict[str, Tensor]:
        second = self.augmentation.invert(step.teacher_outputs["augmented"], step.kept[self.KEY])
        return {"l_lcr": self.loss(step.output, second)}
