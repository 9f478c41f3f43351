"""PIQE's block criteria, soft and differentiable on feature maps.

Venkatanath et al., "Blind image quality evaluation using perception based features" (PIQE), NCC 2015: active blocks of
the MSCN map can be noticeably distorted (blocking, blur: an edge has a flat segment) or noisy (the centre is like the
rest of the block). Written from the paper.

The paper's thresholds, for 16x16 blocks of the MSCN map of luma in [0, 255] (c = 1):

- active: variance >= 0.1;
- noticeably distorted: one of the 4 x 11 segments of six neighbouring values along the four edges has a
  standard deviation < 0.1;
- noisy: sigma > 2 beta, where sigma is the block's standard deviation, r the ratio of the standard deviations
  of its two centre columns and of all others, and beta = |sigma - r| / max(sigma, r).

Where the paper is silent this follows ``piqe`` of MATLAB's Image Processing Toolbox: variances and standard deviations
are unbiased (n - 1), and the border is replicated at the bottom and right up to a multiple of 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdsr.losses.mscn import mscn, widened

BLOCK = 16
ACTIVE_VARIANCE = 0.1
SEGMENT_DEVIATION = 0.1
SMALLEST_BLOCK = 4  # needed for edge segments and for columns around the centre


def block_size(stride: int, full: int = BLOCK) -> int:
    """Side of the blocks of features at 1/stride of the image's resolution: max(4, full // stride), made even."""
    return max(SMALLEST_BLOCK, full // stride // 2 * 2)


def _blocks(y: Tensor, block: int) -> Tensor:
    """(N, H, W, C) -> a view, (N, rows, block, columns, block, C)."""
    return y.unflatten(2, (-1, block)).unflatten(1, (-1, block))


def _edges(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the borders of (N, rows, block, columns, block, C), (block, 2, N, rows, columns, C) each: top and
    bottom, left and right. The first dimension runs along the border.
    """
    last = blocks.shape[2] - 1
    return blocks[:, :, ::last].permute(4, 2, 0, 1, 3, 5), blocks[..., ::last, :].permute(2, 4, 0, 1, 3, 5)


def _sliding_sums(x: Tensor, length: int) -> Tensor:
    """Sums of ``length`` neighbours along the borders of ``_edges``."""
    count = len(x) - length + 1
    out = x[:count] + x[1 : 1 + count]
    for k in range(2, length):
        out += x[k : k + count]
    return out


class _Variances(torch.autograd.Function):
    """MSCN map (N, C, H, W), sides multiples of ``block`` -> (3, N, rows, columns, C): the variances of each block, of
    its two centre columns and of its other columns; and (4, N, rows, columns, C): the lowest variance of segments of
    its top, bottom, left and right edge.

    Autograd would add up a map of y's size for each part. The gradient of a variance is 2 (value - mean) / (n - 1), so
    that only means are needed.
    """

    @staticmethod
    def forward(ctx, y: Tensor, block: int) -> tuple[Tensor, Tensor]:
        y = y.movedim(1, 3)
        centre = slice(block // 2 - 1, block // 2 + 1)
        # sums of the blocks' columns, (N, rows, columns, block, C): faster than pooling
        heights, heights2 = (x.unflatten(1, (-1, block)).sum(2).unflatten(2, (-1, block)) for x in (y, y * y))
        parts = [(x.sum(3), x[:, :, :, centre].sum(3)) for x in (heights, heights2)]
        totals, totals2 = ((whole, middle, whole - middle) for whole, middle in parts)
        counts = (block**2, 2 * block, block**2 - 2 * block)
        variances = [
            torch.addcmul(squares, total, total, value=-1 / count).div_(count - 1).clamp_min_(0)
            for total, squares, count in zip(totals, totals2, counts, strict=True)
        ]
        means = [total / count for total, count in zip(totals, counts, strict=True)]
        edges = torch.cat(_edges(_blocks(y, block)), 1)
        length = max(2, round(6 * block / BLOCK))
        pieces = _sliding_sums(edges, length)
        spreads = _sliding_sums(edges * edges, length).addcmul_(pieces, pieces, value=-1 / length)
        lowest = spreads.amin(0)
        ctx.save_for_backward(y, *means, edges, pieces, spreads, lowest)
        ctx.block, ctx.centre, ctx.counts, ctx.length = block, centre, counts, length
        return torch.stack(variances), lowest.div(length - 1).clamp_min_(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_blocks: Tensor, of_lowest: Tensor) -> tuple[Tensor, None]:
        y, *means, edges, pieces, spreads, lowest = ctx.saved_tensors
        slopes = [of_blocks[k] * (2 / (count - 1)) for k, count in enumerate(ctx.counts)]
        shifts = [slope * mean for slope, mean in zip(slopes, means, strict=True)]
        # slope * y - shift, summed over the two parts of each column: (N, rows, 1, columns, block, C)
        factor, shift = (
            (whole + other).unsqueeze(3).repeat(1, 1, 1, ctx.block, 1) for whole, _, other in (slopes, shifts)
        )
        factor[:, :, :, ctx.centre] = (slopes[0] + slopes[1]).unsqueeze(3)
        shift[:, :, :, ctx.centre] = (shifts[0] + shifts[1]).unsqueeze(3)
        factor, shift = (x.unsqueeze(2) for x in (factor, shift))
        out = torch.addcmul(shift.neg_(), _blocks(y, ctx.block), factor)
        # the same for the lowest segments; equal ones share the gradient
        slope = (spreads == lowest).to(y.dtype)
        slope.mul_(of_lowest * (2 / (ctx.length - 1)) / slope.sum(0))
        shift = pieces * slope / ctx.length
        of_edges, shifts_of_edges = torch.zeros_like(edges), torch.zeros_like(edges)
        for k in range(ctx.length):
            of_edges[k : k + len(slope)] += slope
            shifts_of_edges[k : k + len(slope)] += shift
        of_edges.mul_(edges).sub_(shifts_of_edges)
        for border, along in zip(_edges(out), of_edges.chunk(2, 1), strict=True):
            border.add_(along)
        return out.flatten(3, 4).flatten(1, 2).movedim(3, 1), None


def _padded(x: Tensor, block: int) -> Tensor:
    height, width = x.shape[2:]
    if height % block == 0 and width % block == 0:
        return x
    return F.pad(x, (0, -width % block, 0, -height % block), mode="replicate")


def _noise(deviations: Tensor, eps: float) -> Tensor:
    """sigma - 2 beta, positive for noisy blocks, from the square roots of ``_Variances``' first output."""
    sigma, centre, surround = deviations.unbind()
    ratio = centre / (surround + eps)
    return sigma - 2 * (sigma - ratio).abs() / (torch.maximum(sigma, ratio) + eps)


def edge_texture_statistics(
    x: Tensor, c: float | Tensor, *, block: int = BLOCK, softness: float = 0.02
) -> Tensor:
    """The PIQE extractor P of SLKD: eight differentiable numbers per block of every channel.

    0: variance v of the block; 1: the soft active mask ``m = sigmoid((v - 0.1) / t)``; 2 to 5: the lowest
    standard deviation among the segments of the top, bottom, left and right edge; 6: soft noticeable
    distortion ``m sigmoid((0.1 - lowest of 2 to 5) / t)``; 7: soft noise ``m sigmoid((sigma - 2 beta) / 5t)``. For
    t -> 0 numbers 1, 6 and 7 are the classic decisions.

    Args:
        x: Feature maps (N, C, H, W). The border is replicated up to a multiple of ``block``.
        c: The MSCN constant, ``contrast_constant`` of the teacher's features.
        block: Side b of a block, even, at least 4. Edge segments have 6b / 16 values, at least 2.
        softness: t, the width of the soft thresholds at 0.1. The noise criterion, whose values are about five times
            larger, uses 5t.

    Returns:
        (N, C, 8, rows, columns) of blocks, in float32 (float64 for float64).

    Raises:
        ValueError: ``block`` is odd or below 4.
    """
    if block < SMALLEST_BLOCK or block % 2:
        raise ValueError(
            f"PIQE blocks of {block}x{block}: the side must be even and at least {SMALLEST_BLOCK}"
        )
    variances, lowest = _Variances.apply(mscn(_padded(widened(x), block), c), block)
    # limits the gradient of the square root below a standard deviation of 1e-5
    deviations, edges = variances.clamp_min(1e-10).sqrt(), lowest.clamp_min(1e-10).sqrt()
    variance, _, _ = variances.unbind()
    mask = torch.sigmoid((variance - ACTIVE_VARIANCE) / softness)
    distorted = mask * torch.sigmoid((SEGMENT_DEVIATION - edges.amin(0)) / softness)
    noisy = mask * torch.sigmoid(_noise(deviations, 1e-3) / (5 * softness))
    numbers = torch.cat([torch.stack([variance, mask]), edges, torch.stack([distorted, noisy])])
    return numbers.permute(1, 4, 0, 2, 3)
