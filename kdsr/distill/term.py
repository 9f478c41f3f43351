"""Term: a loss, or a method with state, that any KDModel can use; enabled by one key of ``train``.

A term declares what it needs and computes its losses from the ``Step``. It does not depend on the model or on other
terms, so terms can be combined: DCKD with zoomed views is DCKD*, SLKD with FitNet is two lines of options.
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
    """BasicSR's registry for terms; their keys must be unique."""

    def _do_register(self, name: str, obj: type[Term], suffix: str | None = None) -> None:
        for other, term in self:
            assert term.KEY != obj.KEY, f"{name}: train.{obj.KEY} is the key of {other} already"
        assert obj.KEY in obj.options.declared(), f"{name}: {obj.options.__name__} does not declare {obj.KEY}"
        super()._do_register(name, obj, suffix)


TERM_REGISTRY = TermRegistry("term")

Shapes = Sequence[tuple[torch.Size, torch.Size]]  # of the student's and the teacher's features of a group


def all_terms() -> dict[str, type[Term]]:
    """Returns the registered terms by their keys, in the order of registration."""
    return {term.KEY: term for _, term in TERM_REGISTRY}


@dataclass(frozen=True)
class Setup:
    """What a term may use in its constructor.

    Attributes:
        opt: All options.
        device: The device of the run.
        student: The bare student.
        sample_lq: Returns a black LQ patch of the initial training size, (1, C, H, W).
        loss: Builds the loss ``train.<key>``; None if there is none.
        frozen: Builds ``network_<key>`` with its weights, once per run: eval mode, no gradients.
        new_student: Builds another network like the student, with random weights, eval mode, no gradients.
        copied: Copies a network; eval mode, no gradients.
        multiple_of: Returns the divisor that the sides of a network's images must have.
    """

    opt: Mapping[str, Any]
    device: torch.device
    student: nn.Module
    sample_lq: Callable[[], Tensor]
    loss: Callable[[str], nn.Module | None]
    frozen: Callable[[str], nn.Module]
    new_student: Callable[[], nn.Module]
    copied: Callable[[nn.Module], nn.Module]
    multiple_of: Callable[[nn.Module], int]

    @property
    def train(self) -> Mapping[str, Any]:
        return self.opt["train"]

    @property
    def scale(self) -> int:
        return self.opt.get("scale") or 1


class Term(ABC):
    """Base class of the terms. Subclasses must implement ``losses``; other methods are optional.

    A step calls, for all terms each: ``prepare``, then the teachers, ``before_student``, then the student, ``losses``,
    then the update, ``after_step``.

    Attributes:
        KEY: The key of ``train`` that enables the term, ``*_opt``; its value is the options of a registered loss.
        options: Declares this key and the other keys of ``train`` that the term reads; in an instance, their values.
        NETWORKS: Networks of the term other than the teacher: ``extractor`` for ``network_extractor``.
        NEEDS: Any of ``teacher`` (the network ``network_t``), ``teacher_output`` (T(x), which may also be stored),
            ``taps`` (``train.taps`` lists features of student and teacher) and ``gt`` (ground truth).
        COMPARES_IMAGES: Whether ``loss`` must take two batches of images, (N, C, H, W); checked after a failed first
            step.
        LABELS: Labels of its ``networks`` in ``kdsr bench step``, by their names.

    Args:
        setup: Options and builders.
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
        assert loss is not None  # a term is built only if its key is given
        self.loss = loss

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        """Returns problems of the options beyond kinds and ``NEEDS``; called if ``KEY`` is given."""
        return []

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        """Returns the keys of ``train`` that need ground truth, each with a remedy if there is none."""
        return {cls.KEY: "remove it"} if "gt" in cls.NEEDS else {}

    @classmethod
    def patch_multiples(cls, opt: dict[str, Any]) -> dict[str, int]:
        """Returns the divisors that the sides of GT patches must have, by the option that needs them."""
        return {}

    def tap_groups(self) -> dict[str, TapGroup]:
        """Returns the features that it compares, by unique names."""
        return {}

    def passes(self, shapes: Mapping[str, Shapes]) -> dict[str, nn.Module]:
        """Returns further passes of the student within DDP: modules that map ``(student, *inputs)`` to a result.

        They may have trained parameters, which are part of the training state and must all be used at every step. A
        module with an attribute ``group`` gets the student's features of that tap group before its other inputs.

        Args:
            shapes: Shapes of the features of each tap group.
        """
        return {}

    def prepare(self, step: Step) -> None:
        """Called before any network runs, to draw random numbers and to add inputs for the teacher
        (``step.show_teacher``) and the student (``step.student_inputs``)."""
        return

    def before_student(self, step: Step) -> None:
        """Called between teacher and student, without gradient, to run frozen networks or derive inputs from T(x)."""
        return

    @abstractmethod
    def losses(self, step: Step) -> dict[str, Tensor]:
        """Returns the weighted losses by name, scalars. Scalars only for the log go into ``step.statistics``."""

    def after_step(self, step: Step) -> None:
        """Called after the update of the student and its EMA, with the last batch of the iteration."""
        return

    def networks(self) -> dict[str, nn.Module]:
        """Returns its frozen networks other than the teachers, by their names in the log and the benchmark."""
        return {}

    def state_networks(self) -> dict[str, nn.Module]:
        """Returns its networks that change, which are part of the training state."""
        return {}


def term_problems(opt: dict[str, Any]) -> list[str]:
    """Returns the problems of the terms that the options enable."""
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
