"""What the losses between lists of feature maps share: the check of their shapes, and vectors of length 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_levels(
    what: str, student: Sequence[Tensor], teacher: Sequence[Tensor], *, channels: bool, sizes: bool = True
) -> None:
    """Features that are compared, one (N, C, H, W) per level.

    Args:
        what: Name of the loss, for the message.
        student: The student's features.
        teacher: The teacher's.
        channels: Whether the numbers of channels must agree.
        sizes: Whether heights and widths must.

    Raises:
        ValueError: Numbers of levels, of samples, or what must agree of the shapes, differ.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"{what}: {len(student)} levels of the student and {len(teacher)} of the teacher")
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        alike = s.dim() == t.dim() == 4 and len(s) == len(t)
        alike = alike and (not channels or s.shape[1] == t.shape[1])
        if not alike or (sizes and s.shape[2:] != t.shape[2:]):
            cure = "an adapter has to bring them to the same one" if channels else "resize the student's"
            raise ValueError(
                f"{what}, level {level}: the student's features have the shape {tuple(s.shape)}, the "
                f"teacher's {tuple(t.shape)}; {cure}"
            )


def unit(x: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """Vectors along ``dim`` brought to length 1; one that is shorter than ``eps`` stays as it is.

    (``F.normalize`` divides such a one, and with it its gradient, by its ``eps``.)
    """
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(length > eps, length, torch.ones_like(length))
