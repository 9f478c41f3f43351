"""What a student learns from images: the ground truth, the teacher's output, and the teacher's second opinion."""

from __future__ import annotations

from torch import Tensor

from kdsr.distill.step import Step
from kdsr.distill.term import TERM_REGISTRY, Setup, Term
from kdsr.terms.label_consistency import LabelConsistency

OFF = (dict, type(None))  # the kinds of a term's key: a loss, or null


@TERM_REGISTRY.register()
class PixelTerm(Term):
    """``l_pix = L1(S(x), y)``, or any other pixel loss."""

    KEY = "pixel_opt"
    TRAIN_KEYS = {KEY: OFF}
    NEEDS = frozenset({"gt"})
    COMPARES_IMAGES = True

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"l_pix": self.loss(step.output, step.ground_truth)}


@TERM_REGISTRY.register()
class LogitsTerm(Term):
    """``l_ts = L1(S(x), T(x))``: response distillation (Hinton et al., 2015, with images in place of logits)."""

    KEY = "logits_opt"
    TRAIN_KEYS = {KEY: OFF}
    NEEDS = frozenset({"teacher_output"})
    COMPARES_IMAGES = True

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"l_ts": self.loss(step.output, step.teacher_output)}


@TERM_REGISTRY.register()
class LabelConsistencyTerm(Term):
    """``l_lcr = L1(S(x), A⁻¹ T(A x))`` of DCKD's release: A inverts colours, flips and transposes at random.

    ``noisy.prob``: probability of each augmentation for each sample (0.5).
    """

    KEY = "lcr_opt"
    TRAIN_KEYS = {KEY: OFF, "noisy": {"prob": (int, float)}}
    NEEDS = frozenset({"teacher"})
    COMPARES_IMAGES = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.augmentation = LabelConsistency.of(setup.train)

    def prepare(self, step: Step) -> None:
        plan = self.augmentation.draw(len(step.lq), step.generator)
        step.kept[self.KEY] = plan
        step.show_teacher("augmented", self.augmentation.apply(step.lq, plan))

    def losses(self, step: Step) -> dict[str, Tensor]:
        second = self.augmentation.invert(step.teacher_outputs["augmented"], step.kept[self.KEY])
        return {"l_lcr": self.loss(step.output, second)}
