"""Shared parts of the losses: checks of options and shapes, normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdsr.runtime.errors import OptionError


def check_choice(loss: str, option: str, value: str, choices: Sequence[str]) -> None:
    """Raises an ``OptionError`` if an option of a loss is not one of its choices."""
    if value not in choices:
        raise OptionError(f"{loss}: {option} {value!r} is unknown; it can be {' or '.join(choices)}")


def check_levels(
    what: str, student: Sequence[Tensor], teacher: Sequence[Tensor], *, channels: bool, sizes: bool = True
) -> None:
    """Checks that features, one (N, C, H, W) per level, can be compared.

    Args:
        what: Name of the loss, for messages.
        student: The student's features.
        teacher: The teacher's features.
        channels: Whether the numbers of channels must be equal.
        sizes: Whether heights and widths must be equal.

    Raises:
        ValueError: They cannot.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"{what}: {len(student)} levels of the student and {len(teacher)} of the teacher")
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        match = s.dim() == t.dim() == 4 and len(s) == len(t)
        match = match and (not channels or s.shape[1] == t.shape[1])
        if not match or (sizes and s.shape[2:] != t.shape[2:]):
            remedy = "an adapter has to make them equal" if channels else "resize the student's"
            raise ValueError(
                f"{what}, level {level}: the student's features have the shape {tuple(s.shape)}, the "
                f"teacher's {tuple(t.shape)}; {remedy}"
            )


def unit(x: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """Normalises vectors along ``dim``; shorter ones than ``eps`` stay unchanged.

    (``F.normalize`` divides them and their gradients by ``eps``.)
    """
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(length > eps, length, torch.ones_like(length))


def levels_needed(weights: Sequence[float]) -> int:
    """How many levels of features a loss compares: up to the last weight that is not 0, at least one."""
    return max((level for level, weight in enumerate(weights, 1) if weight), default=1)


def levels_compared(loss: nn.Module) -> int | None:
    """How many levels of an extractor a loss compares, also inside a schedule or mask; None: all of them."""
    every = (getattr(part, "weights", None) for part in loss.modules())
    weights = next((each for each in every if isinstance(each, tuple)), ())
    needed = levels_needed(weights)
    return needed if needed < len(weights) else None
