"""Term: one loss, or one method with its state, that any KDModel takes; switched on by one key of ``train``.

A term declares what it needs and computes its losses from the ``Step``. It knows nothing of the model and of other
terms, so that terms compose: DCKD with zoomed views is DCKD*, SLKD with FitNet is two lines of options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from basicsr.utils.registry import Registry
from torch import Tensor, nn

from kdsr.distill.adapters import TapGroup
from kdsr.distill.step import Step
from kdsr.distill.tap_options import missing_taps
from kdsr.runtime.declarations import Network, Options


class TermRegistry(Registry):
    """BasicSR's registry, for terms: no two of them are switched on by the same key."""

    def _do_register(self, name: str, obj: type[Term], suffix: str | None = None) -> None:
        for other, term in self:
            assert term.KEY != obj.KEY, f"{name}: train.{obj.KEY} is the key of {other} already"
        assert obj.KEY in obj.options.declared(), f"{name}: {obj.options.__name__} does not declare {obj.KEY}"
        super()._do_register(name, obj, suffix)


TERM_REGISTRY = TermRegistry("term")

Shapes = Sequence[tuple[torch.Size, torch.Size]]  # of a group's features: the student's, the teacher's


def all_terms() -> dict[str, type[Term]]:
    """The registered terms by their keys, in the order of registration."""
    return {term.KEY: term for _, term in TERM_REGISTRY}


@dataclass(frozen=True)
class Setup:
    """What a term may use while it is built.

    Attributes:
        opt: All options.
        device: Where the run computes.
        student: The bare student.
        sample_lq: Makes an empty LQ patch of the size that training begins with, (1, C, H, W).
        loss: Builds the loss that ``train.<key>`` names; None where there is none.
        frozen: Builds ``network_<key>`` with its weights, once per run: eval mode, no gradients.
        new_student: Builds a further network like the student, with random weights, eval mode, no gradients.
        multiple_of: What the sides of a network's images must be divisible by.
    """

    opt: Mapping[str, Any]
    device: torch.device
    student: nn.Module
    sample_lq: Callable[[], Tensor]
    loss: Callable[[str], nn.Module | None]
    frozen: Callable[[str], nn.Module]
    new_student: Callable[[], nn.Module]
    multiple_of: Callable[[nn.Module], int]

    @property
    def train(self) -> Mapping[str, Any]:
        return self.opt["train"]

    @property
    def scale(self) -> int:
        return self.opt.get("scale") or 1


class Term(ABC):
    """Base of the terms: ``losses`` is each one's own, the rest is overridden where it is needed.

    A step calls ``prepare`` of every term, then the teachers, ``before_student`` of every term, the student, ``losses``
    of every term, and after the update ``after_step`` of every term.

    Attributes:
        KEY: The key of ``train`` that switches it on, ``*_opt``; its value are the options of a registered loss.
        options: Declares that key and the others of ``train`` that it reads; in an instance their values.
        NETWORKS: Networks that it reads beside the teacher: ``extractor`` for ``network_extractor``.
        NEEDS: Any of ``teacher`` (``network_t`` is given), ``teacher_output`` (T(x) too), ``taps`` (``train.taps``
            names features of student and teacher) and ``gt`` (ground truth).
        COMPARES_IMAGES: Whether ``loss`` takes two batches of images, (N, C, H, W); one that cannot is then named.
        LABELS: What its ``networks`` are called in ``kdsr bench step``, by their names.

    Args:
        setup: What it may build from.
    """

    KEY: ClassVar[str]
    options: Any = Options
    NETWORKS: ClassVar[Mapping[str, Network]] = {}
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    COMPARES_IMAGES: ClassVar[bool] = False
    LABELS: ClassVar[Mapping[str, str]] = {}

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.options = type(self).options.read(setup.train)
        loss = setup.loss(self.KEY)
        assert loss is not None  # a term is built where its key is given
        self.loss = loss

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        """What is wrong with the options beside kinds and ``NEEDS``; called when ``KEY`` is given."""
        return []

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        """The keys of ``train`` that need ground truth when it is on, each with what to do where there is none."""
        return {cls.KEY: "take it out"} if "gt" in cls.NEEDS else {}

    @classmethod
    def patch_multiples(cls, opt: dict[str, Any]) -> dict[str, int]:
        """What the sides of training patches of the ground truth must be multiples of, by the option that asks."""
        return {}

    def tap_groups(self) -> dict[str, TapGroup]:
        """Which features it compares, by a name that no other term uses."""
        return {}

    def passes(self, shapes: Mapping[str, Shapes]) -> dict[str, nn.Module]:
        """Further passes of the student, within what DDP wraps: modules that map ``(student, *inputs)`` to a result.

        They may hold trained parameters, which then belong to the training state; all of them must be used at every
        step. One with an attribute ``group`` gets the student's features of that tap group before its other inputs.

        Args:
            shapes: Of the features of each tap group.
        """
        return {}

    def prepare(self, step: Step) -> None:
        """Before any network runs: draws, and says what else teacher (``step.show_teacher``) and student
        (``step.student_inputs``) are to see."""
        return

    def before_student(self, step: Step) -> None:
        """Between teacher and student, without gradient: the term's own frozen networks, inputs made of T(x)."""
        return

    @abstractmethod
    def losses(self, step: Step) -> dict[str, Tensor]:
        """The weighted losses by name, scalars. Scalars for the log alone go into ``step.statistics``."""

    def after_step(self, step: Step) -> None:
        """After the update of the student and of its EMA."""
        return

    def networks(self) -> dict[str, nn.Module]:
        """Its frozen networks beside the teachers, by the name under which they are logged and measured."""
        return {}

    def state_networks(self) -> dict[str, nn.Module]:
        """Those of its networks that change: they belong to the training state."""
        return {}


def term_problems(opt: dict[str, Any]) -> list[str]:
    """What is missing for the terms that the options switch on; each message names its option."""
    train = opt.get("train") or {}
    problems = []
    for key, term in all_terms().items():
        if not train.get(key):
            continue
        if {"teacher", "teacher_output"} & term.NEEDS and not opt.get("network_t"):
            problems.append(f"train.{key}: needs a teacher; give network_t and path.pretrain_network_t")
        problems += term.problems(opt)
    untapped = [key for key, term in all_terms().items() if train.get(key) and "taps" in term.NEEDS]
    if untapped and not train.get("taps"):
        problems.append(missing_taps(opt, "taps", untapped))
    return problems
