"""The student with its trainable adapters: what DDP wraps and the optimizer sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.models.feature_taps import FeatureTaps, shapes_of
from kdsr.runtime.errors import OptionError


class TapPair(NamedTuple):
    """A student's feature and the teacher's that it is compared with, by module names."""

    student: str
    teacher: str


class TapGroup(NamedTuple):
    """Features of the student that are compared with those of one teacher.

    Attributes:
        option: The option that lists them (``train.taps``).
        pairs: Their names.
        teacher: The bare, frozen teacher.
        adapt: Whether the student's features pass adapters; without, they keep their own channels.
    """

    option: str
    pairs: Sequence[TapPair]
    teacher: nn.Module
    adapt: bool = True


class Answer(NamedTuple):
    """What a bundle gives: all that may be in a loss, so that DDP finds which parameters are used.

    Attributes:
        output: The student's.
        features: Its adapted features, by group.
        results: What further passes gave, by name.
    """

    output: Tensor
    features: dict[str, list[Tensor]]
    results: dict[str, Any]


class StudentBundle(nn.Module):
    """Maps ``lq`` to the student's output, and keeps the student's adapted features of that pass.

    Each feature goes through a 1×1 convolution from the student's channels to the teacher's ("scale conversion
    module" in SLKD, "DR block" in FACD), unless its group says otherwise. ``features`` has them by group, ``results``
    what further passes of the student gave. Adapters and passes belong to the training state and never to the student's
    file.

    Args:
        student: The bare network.
        groups: What is compared with what, by name.
        lq: A batch of the size that training sees, (1, C, H, W), with which shapes are found out once.
        passes: Further passes by name: modules that map ``(student, *views)`` to a result. They come after the
            student's own, whose features are then taken; one with an attribute ``group`` gets those of that group, as
            the first of its views.

    Raises:
        OptionError: A module does not exist, gives no feature map, or its map cannot be brought to the teacher's size.
    """

    def __init__(
        self,
        student: nn.Module,
        groups: Mapping[str, TapGroup],
        lq: Tensor,
        passes: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.features: dict[str, list[Tensor]] = {}
        self.results: dict[str, Any] = {}
        self.passes = nn.ModuleDict(passes or {})
        self.taps = {
            name: FeatureTaps(student, [pair.student for pair in group.pairs], f"{group.option}.student")
            for name, group in groups.items()
        }
        self.teacher_taps = {
            name: FeatureTaps(
                group.teacher, [pair.teacher for pair in group.pairs], f"{group.option}.teacher"
            )
            for name, group in groups.items()
        }
        self.adapters = nn.ModuleDict()
        for name, group in groups.items():
            ours = shapes_of(student, self.taps[name], lq)
            theirs = shapes_of(group.teacher, self.teacher_taps[name], lq)
            self.adapters[name] = nn.Sequential(
                *(_adapter(group, *matched) for matched in zip(group.pairs, ours, theirs, strict=True))
            )

    def trained_parts(self) -> dict[str, nn.Module]:
        """What is trained beside the student, by the name under which the state keeps it."""
        parts = {"adapters": self.adapters, "passes": self.passes}
        return {name: part for name, part in parts.items() if next(part.parameters(), None) is not None}

    def forward(self, lq: Tensor, views: Mapping[str, tuple[Any, ...]] | None = None) -> Answer:
        output = self.student(lq)
        for name, taps in self.taps.items():
            adapters = self.adapters[name]
            features = zip(adapters.children(), taps.take(lq), strict=True)
            self.features[name] = [adapter(feature) for adapter, feature in features]
        for name, further in self.passes.items():
            seen = (views or {}).get(name, ())
            group = getattr(further, "group", None)
            if group is not None:
                seen = (self.features[group], *seen)
            self.results[name] = further(self.student, *seen)
        if self.passes:  # what the taps have kept of these is of no use
            self.forget()
        return Answer(output, self.features, self.results)

    def forget(self) -> None:
        """Drops what the taps of student and teachers have kept of the last pass."""
        for taps in (*self.taps.values(), *self.teacher_taps.values()):
            taps.forget()


def resized_like(features: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Features at the sizes of others, level by level: bilinear where they differ, (N, C, H, W)."""
    return [
        feature
        if feature.shape[-2:] == target.shape[-2:]
        else F.interpolate(feature, target.shape[-2:], mode="bilinear", align_corners=False)
        for feature, target in zip(features, targets, strict=True)
    ]


def _adapter(group: TapGroup, pair: TapPair, ours: torch.Size, theirs: torch.Size) -> nn.Module:
    (height, width), (their_height, their_width) = ours[2:], theirs[2:]
    same = (height, width) == (their_height, their_width)
    one_pixel = 1 in (height * width, their_height * their_width)
    if not same and (one_pixel or height * their_width != width * their_height):
        raise OptionError(
            f"{group.option}: the student's {pair.student} is {height}x{width}, the teacher's {pair.teacher} "
            f"{their_height}x{their_width}; no adapter bridges these, tap modules of the same level"
        )
    return nn.Conv2d(ours[1], theirs[1], 1) if group.adapt else nn.Identity()
