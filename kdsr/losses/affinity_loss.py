"""Feature affinity: how alike any two positions of a feature map are.

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

from kdsr.losses.levels import check_levels, unit
from kdsr.losses.mscn import widened
from kdsr.runtime.errors import OptionError, TrainingError, is_out_of_memory

REDUCTIONS = ("pool", "sample")
FULL = 48 * 48  # positions of the patches that the paper trains with

# Entries of the affinities that exist at the same time, of all images together. On a CPU fewer make the products slow,
# more make them no faster.
BLOCK = 2**24
BLOCK_CPU = 2**22


class _AffinityDistance(torch.autograd.Function):
    """Mean absolute difference of ``s^T s`` and ``t^T t``; s (N, C, P) and t (N, C', P) have columns of length 1.

    Never more than some rows of the (N, P, P) affinities are there, and of these, which are symmetric, only the part
    from the diagonal on. The gradient ``2 s sign(s^T s - t^T t) / (N P^2)`` is made along with the value: what is kept
    for the backward pass has the size of s.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        images, _, positions = student.shape
        rows = block_rows(images, positions, student.is_cuda)
        wants_gradient = ctx.needs_input_grad[0]
        total, slope = student.new_zeros(()), torch.zeros_like(student)
        with torch.autocast(student.device.type, enabled=False):
            for first in range(0, positions, rows):
                ours, theirs = (x[:, :, first : first + rows].mT for x in (student, teacher))
                rest, their_rest = student[:, :, first:], teacher[:, :, first:]
                difference = torch.baddbmm(theirs @ their_rest, ours, rest, beta=-1)
                count = difference.shape[1]
                beyond = difference[:, :, count:]  # these are there twice, below the diagonal too
                total += difference.abs().sum() + beyond.abs().sum()
                if wants_gradient:
                    difference.sign_()
                    slope[:, :, first : first + rows] += rest @ difference.mT
                    slope[:, :, first + rows :] += ours.mT @ beyond
        size = images * positions**2
        if wants_gradient:
            ctx.save_for_backward(slope.mul_(2 / size))
        return total / size

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad, None


def block_rows(images: int, positions: int, on_gpu: bool) -> int:
    """How many rows of all images' affinities are computed at once."""
    return max(1, (BLOCK if on_gpu else BLOCK_CPU) // (images * positions))


def reduction_factor(height: int, width: int, max_positions: int) -> int:
    """By how much both sides of a map are divided (rounding up) so that at most ``max_positions`` are left; >= 1."""
    factor = 1
    while -(-height // factor) * -(-width // factor) > max_positions:
        factor += 1
    return factor


def reduced(features: Tensor, factor: int, reduce: str) -> Tensor:
    """Fewer positions: (N, C, H, W) -> (N, C, ceil(H / factor), ceil(W / factor)).

    Args:
        features: Of student or teacher.
        factor: 1 leaves them as they are.
        reduce: ``pool``: means of squares of ``factor`` x ``factor`` positions, at the border of what there is.
            ``sample``: the position in the middle of each of them.
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

    F has a column per position, of length 1 (a column of zeros stays). A has (H W)^2 entries per image: where a map
    has more than ``max_positions``, both networks' maps are reduced first.

    Args:
        student: The student's features, one (N, C, H, W) per level; they alone receive a gradient.
        teacher: The teacher's: same sizes, any number of channels.
        max_positions: Up to so many positions H W the affinity is the full one.
        reduce: See ``reduced``.

    Returns:
        A scalar in [0, 2] per level, in float32 at least.

    Raises:
        ValueError: Numbers of levels or sizes differ.
        TrainingError: There is not enough memory; with the sizes, and what helps.
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
    """``affinity_distance`` as a loss of option files.

    Args:
        loss_weight: Factor of the term (the paper: 10, beside 0.5 for each of the two other terms).
        max_positions: Up to so many positions of a map (48x48: the paper's patches) its affinity is computed in
            full; the time goes with their square.
        reduce: What is done with larger maps: ``pool`` (averaged) or ``sample`` (evenly strided positions).

    Raises:
        OptionError: A value is none of those.
    """

    def __init__(self, loss_weight: float = 1.0, max_positions: int = FULL, reduce: str = "pool") -> None:
        super().__init__()
        if reduce not in REDUCTIONS:
            raise OptionError(
                f"AffinityLoss: reduce {reduce!r} is unknown; it can be {' or '.join(REDUCTIONS)}"
            )
        if max_positions < 2:
            raise OptionError(f"AffinityLoss: max_positions {max_positions} must be 2 or more")
        self.loss_weight = loss_weight
        self.max_positions = max_positions
        self.reduce = reduce

    def form(self, height: int, width: int) -> str:
        """How the affinity of a map of this size is computed, for the log."""
        factor = reduction_factor(height, width, self.max_positions)
        if factor == 1:
            return f"full, {height}x{width} positions"
        how = "pooled" if self.reduce == "pool" else "sampled"
        return f"{how} to {-(-height // factor)}x{-(-width // factor)} of {height}x{width} positions"

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Features as in ``affinity_distance`` -> scalar."""
        value = affinity_distance(student, teacher, max_positions=self.max_positions, reduce=self.reduce)
        return self.loss_weight * value
