"""Terms that compare the student's tapped features with the teacher's: FitNet, attention, affinity, relations.

They read the pairs in ``train.taps``. Equations and sources are in the docstrings of the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from basicsr.utils import get_root_logger
from torch import Tensor

from kdsr.distill.adapters import TapGroup, resized_like
from kdsr.distill.step import Step
from kdsr.distill.tap_options import tap_pairs
from kdsr.distill.term import TERM_REGISTRY, Term
from kdsr.losses.affinity_loss import AffinityLoss
from kdsr.losses.attention_loss import AttentionTransferLoss
from kdsr.losses.fitnet_loss import FitNetLoss
from kdsr.losses.relation_loss import FEWEST, RKDLoss
from kdsr.runtime.declarations import Options, Section, loss, option

PAIRS = "pairs of module names, `[{student: body.3, teacher: body.7}, ...]`"


class TapOptions(Options):
    taps: list | Section | None = option(
        None, f"Features that terms compare: {PAIRS} or `{{student: [...], teacher: [...]}}`."
    )


def smallest_batch(opt: dict[str, Any]) -> int | None:
    """Returns the smallest batch size per process; None if it is not given."""
    train = (opt.get("datasets") or {}).get("train") or {}
    stages = train.get("progressive")
    sections = [train, *(stages if isinstance(stages, list) else [])]
    sizes = [section.get("batch_size_per_gpu") for section in sections if isinstance(section, dict)]
    return min((size for size in sizes if isinstance(size, int)), default=None)


class FeatureTerm(Term):
    """A loss on pairs of features.

    Attributes:
        NAME: Name of its tap group; its loss is ``l_NAME``.
        ADAPT: Whether a trainable 1×1 convolution maps the student's features to the teacher's channels.
        RESIZE: Whether the student's features are resized to the teacher's.
    """

    NAME: ClassVar[str]
    ADAPT: ClassVar[bool] = False
    RESIZE: ClassVar[bool] = True
    NEEDS = frozenset({"teacher", "taps"})

    def tap_groups(self) -> dict[str, TapGroup]:
        return {self.NAME: TapGroup("train.taps", tap_pairs(self.options.taps), adapt=self.ADAPT)}

    def losses(self, step: Step) -> dict[str, Tensor]:
        features, targets = step.student_features[self.NAME], step.teacher_features[self.NAME]
        if self.RESIZE:
            features = resized_like(features, targets)
        self.log_form(targets)
        return {f"l_{self.NAME}": self.loss(features, targets)}

    def log_form(self, features: Sequence[Tensor]) -> None:
        """Called with the teacher's features; may log how they are compared."""


class FitNetOptions(TapOptions):
    fitnet_opt: Section | None = loss("Difference of features, `l_fitnet`.", FitNetLoss)


@TERM_REGISTRY.register()
class FitNetTerm(FeatureTerm):
    """``l_fitnet``: distance of the student's adapted features from the teacher's (``FitNetLoss``)."""

    KEY, NAME, ADAPT = "fitnet_opt", "fitnet", True
    options = FitNetOptions


class ATOptions(TapOptions):
    at_opt: Section | None = loss("Attention maps of features, `l_at`.", AttentionTransferLoss)


@TERM_REGISTRY.register()
class ATTerm(FeatureTerm):
    """``l_at``: distance between attention maps of student and teacher (``AttentionTransferLoss``)."""

    KEY, NAME = "at_opt", "at"
    options = ATOptions


class FAKDOptions(TapOptions):
    fakd_opt: Section | None = loss("Affinities of features, `l_fakd`.", AffinityLoss)


@TERM_REGISTRY.register()
class FAKDTerm(FeatureTerm):
    """``l_fakd``: distance between affinity matrices of positions in student and teacher (``AffinityLoss``).

    The form of the affinity is logged once for each size of features.
    """

    KEY, NAME = "fakd_opt", "fakd"
    options = FAKDOptions

    logged_sizes: frozenset[tuple[int, ...]] = frozenset()

    def log_form(self, features: Sequence[Tensor]) -> None:
        sizes = {tuple(feature.shape[2:]) for feature in features} - self.logged_sizes
        if not sizes:
            return
        loss = next(module for module in self.loss.modules() if isinstance(module, AffinityLoss))
        for size in sorted(sizes):
            get_root_logger().info(f"train.{self.KEY}: affinity {loss.form(*size)}")
        self.logged_sizes |= sizes


class RKDOptions(TapOptions):
    rkd_opt: Section | None = loss("Relations between the samples of a batch, 3 or more, `l_rkd`.", RKDLoss)


@TERM_REGISTRY.register()
class RKDTerm(FeatureTerm):
    """``l_rkd``: distances and angles between the samples of a batch, at each tap (``RKDLoss``)."""

    KEY, NAME, RESIZE = "rkd_opt", "rkd", False
    options = RKDOptions

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        batch = smallest_batch(opt)
        problems = super().problems(opt)
        if batch is not None and batch < FEWEST:
            problems.append(
                f"train.{cls.KEY}: compares at least {FEWEST} samples of a batch; "
                f"datasets.train.batch_size_per_gpu is {batch}"
            )
        return problems
