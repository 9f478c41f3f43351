"""Term: one more loss of any KDModel, switched on by one key of ``train``.

A model's own step stays as the paper writes it; what any method may add to it (features, relations, more views of the
data) is a term, and terms compose: DCKD with zoomed views is DCKD*, SLKD with FitNet is two lines of options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from kdsr.models.adapters import TapGroup
from kdsr.models.tap_options import missing_taps

if TYPE_CHECKING:  # the model knows its terms; a term knows what a model offers
    from kdsr.models.kd_model import KDModel


class Term(ABC):
    """Base of the terms: ``losses`` is each one's own, the rest is overridden where it is needed.

    In ``losses`` the model offers ``output``, ``lq``, ``gt`` and, with a teacher, ``teacher_output``,
    ``taught_features(group)`` and ``student_bundle.features[group]``; results of ``passes`` are in
    ``student_bundle.results``.

    Attributes:
        KEY: The key of ``train`` that switches it on, ``*_opt``; its value are the options of a registered loss.
        TRAIN_KEYS: Kinds of that key and of others that it reads, as models declare theirs.
        NETWORK_KEYS: Frozen networks beside the teacher: ``extractor`` for ``network_extractor``.
        NEEDS: What it cannot do without, of ``teacher``, ``taps`` and ``gt``.

    Args:
        model: Its student and its teacher are built; its ``build_frozen`` and ``build_loss`` may be used.
    """

    KEY: ClassVar[str]
    TRAIN_KEYS: ClassVar[dict[str, Any]] = {}
    NETWORK_KEYS: ClassVar[frozenset[str]] = frozenset()
    NEEDS: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, model: KDModel) -> None:
        self.model = model
        loss = model.build_loss(self.KEY)
        assert loss is not None  # the model asks for a term by its key
        self.cri = loss

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        """What is wrong with the options beside kinds and ``NEEDS``; called when ``KEY`` is given."""
        return []

    @classmethod
    def keys_with_gt(cls, train: dict[str, Any]) -> dict[str, str]:
        """The keys of ``train`` that need ground truth when it is on, each with what to do where there is none."""
        return {cls.KEY: "take it out"} if "gt" in cls.NEEDS else {}

    def tap_groups(self) -> dict[str, TapGroup]:
        """Which features it compares, by a name that no other term uses."""
        return {}

    def passes(self) -> dict[str, nn.Module]:
        """Further passes of the student, within what DDP wraps: modules that map ``(student, *views)`` to a result.

        They may hold trained parameters, which then belong to the training state; all of them must be used at every
        step.
        """
        return {}

    def prepare(self) -> dict[str, tuple[Any, ...]]:
        """Once per step, before the student runs: the views of its passes. What is drawn is drawn here."""
        return {}

    def teacher_views(self) -> Sequence[Tensor]:
        """What else the teacher is to see in this step, (N, C, H, W) each, of any size."""
        return ()

    @abstractmethod
    def losses(self, current_iter: int, taught: Sequence[Tensor]) -> dict[str, Tensor]:
        """The weighted losses by name; ``taught``: the teacher's outputs on ``teacher_views``."""

    def statistics(self) -> dict[str, Tensor]:
        """What is logged beside the losses, by name (scalars on the device)."""
        return {}


def term_problems(terms: Sequence[type[Term]], opt: dict[str, Any]) -> list[str]:
    """What is missing for the terms that the options switch on; each message names its option."""
    train = opt.get("train") or {}
    problems = []
    for term in terms:
        if not train.get(term.KEY):
            continue
        if "teacher" in term.NEEDS and not opt.get("network_t"):
            problems.append(f"train.{term.KEY}: needs a teacher; give network_t and path.pretrain_network_t")
        problems += term.problems(opt)
    untapped = [term.KEY for term in terms if train.get(term.KEY) and "taps" in term.NEEDS]
    if untapped and not train.get("taps"):
        problems.append(missing_taps(opt, "taps", untapped))
    return problems


def read_with(terms: Sequence[type[Term]]) -> dict[str, tuple[str, ...]]:
    """The keys and networks that terms read beside their own ``KEY``, as a model's ``READ_WITH``."""
    readers: dict[str, tuple[str, ...]] = {}
    for term in terms:
        further = [*(term.TRAIN_KEYS.keys() - {term.KEY}), *(f"network_{key}" for key in term.NETWORK_KEYS)]
        for key in further:
            readers[key] = (*readers.get(key, ()), term.KEY)
    return readers
