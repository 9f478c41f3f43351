"""Which features are compared, and the adapters that bring them to one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.distill.step import X
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
        teacher: The teacher's key: ``t`` for ``network_t``.
        view: The images from which the teacher's features come (``Step.show_teacher``).
        adapt: Whether the student's features go through adapters; without, they keep their own channels.
    """

    option: str
    pairs: Sequence[TapPair]
    teacher: str = "t"
    view: str = X
    adapt: bool = True


def resized_like(features: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Features at the sizes of others, level by level: bilinear where they differ, (N, C, H, W)."""
    return [
        feature
        if feature.shape[-2:] == target.shape[-2:]
        else F.interpolate(feature, target.shape[-2:], mode="bilinear", align_corners=False)
        for feature, target in zip(features, targets, strict=True)
    ]


def make_adapter(group: TapGroup, pair: TapPair, ours: torch.Size, theirs: torch.Size) -> nn.Module:
    """A 1×1 convolution from the student's channels to the teacher's; the identity without ``group.adapt``.

    "Scale conversion module" in SLKD, "DR block" in FACD.

    Args:
        group: The group of the features.
        pair: Their names.
        ours: Shape of the student's feature, (N, C, H, W).
        theirs: Shape of the teacher's.

    Raises:
        OptionError: The sizes have different aspect ratios.
    """
    (height, width), (their_height, their_width) = ours[2:], theirs[2:]
    same = (height, width) == (their_height, their_width)
    one_pixel = 1 in (height * width, their_height * their_width)
    if not same and (one_pixel or height * their_width != width * their_height):
        raise OptionError(
            f"{group.option}: the student's {pair.student} is {height}x{width}, the teacher's {pair.teacher} "
            f"{their_height}x{their_width}; no adapter bridges these, tap modules of the same level"
        )
    return nn.Conv2d(ours[1], theirs[1], 1) if group.adapt else nn.Identity()
