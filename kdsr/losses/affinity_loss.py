"""Feature affinity: similarities between the positions of a feature map.

He et al., "FAKD: Feature-Affinity Based Knowledge Distillation for Efficient Image Super-Resolution", ICIP 2020,
Eq. 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdsr.losses.levels import check_choice, check_levels, unit
from kdsr.losses.mscn import widened
from kdsr.runtime.errors import OptionError, TrainingError, is_out_of_memory

REDUCTIONS = ("pool", "sample")
FULL = 48 * 48  # positions of the paper's training patches

# Number of affinities computed at once, over all images. On a CPU fewer are slower and more are not faster.
BLOCK = 2**24
BLOCK_CPU = 2**22


class _AffinityDistance(torch.autograd.Function):
    """Mean absolute difference of ``s^T s`` and ``t^T t``; s (N, C, P) and t (N, C', P) have columns of norm 1.

    Computes the symmetric (N, P, P) affinities in blocks of rows, from the diagonal on. The forward pass also computes
    the gradient ``2 s sign(s^T s - t^T t) / (N P^2)``, so that only a tensor of the size of s is saved.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        images, _, positions = student.shape
        rows = block_rows(images, positions, student.is_cuda)
        needs_grad = ctx.needs_input_grad[0]
        total, gradient = student.new_zeros(()), torch.zeros_like(student)
        with torch.autocast(student.device.type, enabled=False):
            for first in range(0, positions, rows):
                ours, theirs = (x[:, :, first : first + rows].mT for x in (student, teacher))
                rest, their_rest = student[:, :, first:], teacher[:, :, first:]
                difference = torch.baddbmm(theirs @ their_rest, ours, rest, beta=-1)
                count = difference.shape[1]
                beyond = difference[:, :, count:]  # counts twice: also below the diagonal
                total += difference.abs().sum() + beyond.abs().sum()
                if needs_grad:
                    difference.sign_()
                    gradient[:, :, first : first + rows] += rest @ difference.mT
                    gradient[:, :, first + rows :] += ours.mT @ beyond
        size = images * positions**2
        if needs_grad:
            ctx.save_for_backward(gradient.mul_(2 / size))
        return total / size

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None


def block_rows(images: int, positions: int, on_gpu: bool) -> int:
    """Number of rows of the affinities that are computed at once."""
    return max(1, (BLOCK if on_gpu else BLOCK_CPU) // (images * positions))


def reduction_factor(height: int, width: int, max_positions: int) -> int:
    """The factor >= 1 that reduces a map to at most ``max_positions`` positions (sides rounded up)."""
    factor = 1
    while -(-height // factor) * -(-width // factor) > max_positions:
        factor += 1
    return factor


def reduced(features: Tensor, factor: int, reduce: str) -> Tensor:
    """Reduces the positions: (N, C, H, W) -> (N, C, ceil(H / factor), ceil(W / factor)).

    Args:
        features: Features.
        factor: 1 for no reduction.
        reduce: ``pool``: means of ``factor`` x ``factor`` cells, cut at the border. ``sample``: the position in the
            middle of each cell.
    """
    if factor == 1:
        return features
    if reduce == "pool":
        return F.avg_pool2d(features, factor, ceil_mode=True, count_include_pad=False)
    middle = [
        torch.arange(0, size, factor, device=features.device).add_(factor // 2).clamp_max_(size - 1)
        for size in features.shape[2:]
    ]
    return features[:, :, middle[0].unsqueeze(1), middle[1]]


def affinity_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    max_positions: int = FULL,
    reduce: str = "pool",
) -> Tensor:
    """The sum over levels of the mean absolute difference of the affinities ``A = F^T F``.

    F has a column of norm 1 (or 0) per position. A has (H W)^2 entries per image: maps with more than
    ``max_positions`` positions are reduced first.

    Args:
        student: The student's features, one (N, C, H, W) per level; only they receive a gradient.
        teacher: The teacher's features: same sizes, any number of channels.
        max_positions: Largest number of positions H W without reduction.
        reduce: See ``reduced``.

    Returns:
        A scalar in [0, 2] per level, in at least float32.

    Raises:
        ValueError: Numbers of levels or sizes differ.
        TrainingError: Out of memory, with sizes and remedy.
    """
    check_levels("FAKD", student, teacher, channels=False)
    terms = []
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        factor = reduction_factor(s.shape[2], s.shape[3], max_positions)
        try:
            ours, theirs = (unit(reduced(widened(x), factor, reduce).flatten(2), 1) for x in (s, t.detach()))
            terms.append(_AffinityDistance.apply(ours, theirs))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(_too_large(level, s.shape, factor, s.is_cuda)) from error
    return torch.stack(terms).sum()


def _too_large(level: int, shape: torch.Size, factor: int, on_gpu: bool) -> str:
    images, channels, height, width = shape
    height, width = -(-height // factor), -(-width // factor)
    positions = height * width
    needed = 4 * (
        block_rows(images, positions, on_gpu) * images * positions + 3 * images * channels * positions
    )
    return (
        f"FAKD, level {level}: out of memory. The affinities of {images} maps of {height}x{width} have "
        f"{positions:,d}x{positions:,d} entries each, {4 * images * positions**2 / 2**30:,.1f} GiB; computed in "
        f"blocks, they still need {needed / 2**30:,.1f} GiB. Lower train.fakd_opt.max_positions (reduce: pool or "
        "sample), datasets.train.gt_size or batch_size_per_gpu, or tap smaller features"
    )


@LOSS_REGISTRY.register()
class AffinityLoss(nn.Module):
    """``affinity_distance`` for option files.

    Args:
        loss_weight: Weight of the term (paper: 10, with 0.5 for each of the two other terms).
        max_positions: Largest number of positions without reduction (default: the paper's 48x48). The time grows with
            its square.
        reduce: Reduction of larger maps: ``pool`` (average) or ``sample`` (every n-th position).
    """

    def __init__(self, loss_weight: float = 1.0, max_positions: int = FULL, reduce: str = "pool") -> None:
        super().__init__()
        check_choice("AffinityLoss", "reduce", reduce, REDUCTIONS)
        if max_positions < 2:
            raise OptionError(f"AffinityLoss: max_positions {max_positions} must be 2 or more")
        self.loss_weight = loss_weight
        self.max_positions = max_positions
        self.reduce = reduce

    def form(self, height: int, width: int) -> str:
        """Describes the reduction of a map of this size, for the log."""
        factor = reduction_factor(height, width, self.max_positions)
        if factor == 1:
            return f"full, {height}x{width} positions"
        how = "pooled" if self.reduce == "pool" else "sampled"
        return f"{how} to {-(-height // factor)}x{-(-width // factor)} of {height}x{width} positions"

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Features as in ``affinity_distance`` -> scalar."""
        value = affinity_distance(student, teacher, max_positions=self.max_positions, reduce=self.reduce)
        return self.loss_weight * value
