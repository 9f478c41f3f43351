"""PIQE's block criteria: soft and differentiable on feature maps, and the classic decisions on an image.

Venkatanath et al., "Blind image quality evaluation using perception based features" (PIQE), NCC 2015: the
MSCN map is cut into blocks, and of the active ones some are noticeably distorted (blocking, blur: an edge has
a flat piece) and some are noisy (the centre is like the rest of the block). Written from the paper.

Classic thresholds, all stated by the paper, for 16x16 blocks of the MSCN map of luma in [0, 255] (c = 1):

- active: variance >= 0.1;
- noticeably distorted: one of the 4 x 11 segments of six neighbouring values along the four edges has a
  standard deviation < 0.1;
- noisy: sigma > 2 beta, where sigma is the block's standard deviation, r the ratio of the standard deviations
  of its two centre columns and of all others, and beta = |sigma - r| / max(sigma, r).

Variances and standard deviations are unbiased (n - 1), and an image whose sides are no multiple of 16 gets
its border repeated at the bottom and on the right: so does the implementation in MATLAB's Image Processing
Toolbox (``piqe``), where the paper says nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdsr.losses.mscn import mscn, widened

BLOCK = 16
ACTIVE_VARIANCE = 0.1
SEGMENT_DEVIATION = 0.1
SMALLEST_BLOCK = 4  # below it an edge has no segments and the centre columns leave nothing around them
PER_BLOCK = 8


class _Spread(NamedTuple):
    """Per block (N, C, rows, columns); ``edges`` (N, C, 4, rows, columns): top, bottom, left, right."""

    variance: Tensor
    centre: Tensor  # variance of the two centre columns
    surround: Tensor  # variance of the others
    edges: Tensor  # the lowest variance among the segments of each edge


class PiqeBlocks(NamedTuple):
    """The classic decisions, (N, C, rows, columns) of blocks each; only active blocks are judged."""

    variance: Tensor
    active: Tensor
    distorted: Tensor
    noisy: Tensor


def block_size(stride: int, full: int = BLOCK) -> int:
    """Side of the blocks of features that have 1/stride of the image's resolution: max(4, full // stride).

    One less where that is odd (a stride of 3): a block has two centre columns.
    """
    return max(SMALLEST_BLOCK, full // stride // 2 * 2)


def _unbiased(total: Tensor, squares: Tensor, count: int) -> Tensor:
    return ((squares - total * total / count) / (count - 1)).clamp_min(0)


def _spread(y: Tensor, block: int) -> _Spread:
    """Variances within the blocks of an MSCN map whose sides are multiples of ``block``."""

    blocks = y.unflatten(3, (-1, block)).unflatten(2, (-1, block))  # (N, C, rows, block, columns, block)
    # columns of the blocks first, (N, C, rows, columns, block): faster than pooling
    heights, heights2 = (x.unflatten(2, (-1, block)).sum(3).unflatten(3, (-1, block)) for x in (y, y * y))
    total, total2 = heights.sum(4), heights2.sum(4)
    middle, middle2 = (x[..., block // 2 - 1] + x[..., block // 2] for x in (heights, heights2))
    # (few slices of y itself: autograd makes a map of y's size for each)
    ends = [
        blocks[:, :, :, :: block - 1].transpose(2, 3),  # top and bottom: (N, C, 2, rows, columns, block)
        blocks[..., :: block - 1].permute(0, 1, 5, 2, 4, 3),  # left and right
    ]
    edges = torch.cat(ends, 2)
    length = max(2, round(6 * block / BLOCK))
    pieces, pieces2 = (_sliding_sums(x, length) for x in (edges, edges * edges))
    return _Spread(
        _unbiased(total, total2, block**2),
        _unbiased(middle, middle2, 2 * block),
        _unbiased(total - middle, total2 - middle2, block**2 - 2 * block),
        _unbiased(pieces, pieces2, length).amin(-1),
    )


def _sliding_sums(x: Tensor, length: int) -> Tensor:
    """Sums of ``length`` neighbours along the last axis."""
    count = x.shape[-1] - length + 1
    out = x[..., :count]
    for k in range(1, length):
        out = out + x[..., k : k + count]
    return out


def _padded(x: Tensor, block: int) -> Tensor:
    height, width = x.shape[2:]
    if height % block == 0 and width % block == 0:
        return x
    return F.pad(x, (0, -width % block, 0, -height % block), mode="replicate")


def _noise(sigma: Tensor, centre: Tensor, surround: Tensor, eps: float) -> Tensor:
    """sigma - 2 beta: above 0 the block is noisy."""
    ratio = centre / (surround + eps)
    return sigma - 2 * (sigma - ratio).abs() / (torch.maximum(sigma, ratio) + eps)


def edge_texture_statistics(
    x: Tensor, c: float | Tensor, *, block: int = BLOCK, softness: float = 0.02
) -> Tensor:
    """The PIQE extractor P of SLKD: eight differentiable numbers per block of every channel.

    0: variance v of the block; 1: the soft active mask ``m = sigmoid((v - 0.1) / t)``; 2 to 5: the lowest
    standard deviation among the segments of the top, bottom, left and right edge; 6: soft noticeable
    distortion ``m sigmoid((0.1 - lowest of 2 to 5) / t)``; 7: soft noise
    ``m sigmoid((sigma - 2 beta) / 5t)``. With t -> 0 numbers 1, 6 and 7 are the classic decisions.

    Args:
        x: Feature maps (N, C, H, W). The border is repeated up to a multiple of ``block``.
        c: The MSCN constant, ``contrast_constant`` of the teacher's features.
        block: Side b of a block, 4 at least, even. Edge segments have 6b / 16 values (2 at least).
        softness: t, the width of the soft thresholds at 0.1. That of the noise criterion, whose numbers are
            about five times larger, is 5t.

    Returns:
        (N, C, 8, rows, columns) of blocks, in float32 (float64 for float64).

    Raises:
        ValueError: ``block`` is odd or below 4.
    """
    if block < SMALLEST_BLOCK or block % 2:
        raise ValueError(
            f"PIQE blocks of {block}x{block}: the side must be even and {SMALLEST_BLOCK} at least"
        )
    spread = _spread(mscn(_padded(widened(x), block), c), block)
    # below a standard deviation of 1e-5 the root's slope is cut off
    sigma, centre, surround, edges = (
        variance.clamp_min(1e-10).sqrt()
        for variance in (spread.variance, spread.centre, spread.surround, spread.edges)
    )
    mask = torch.sigmoid((spread.variance - ACTIVE_VARIANCE) / softness)
    distorted = mask * torch.sigmoid((SEGMENT_DEVIATION - edges.amin(2)) / softness)
    noisy = mask * torch.sigmoid(_noise(sigma, centre, surround, 1e-3) / (5 * softness))
    numbers = [spread.variance, mask, *edges.unbind(2), distorted, noisy]
    return torch.stack(numbers, 2)


@torch.no_grad()
def piqe_blocks(luma: Tensor) -> PiqeBlocks:
    """The classic decisions of PIQE on 16x16 blocks, see the top of this file.

    Args:
        luma: (N, C, H, W) in [0, 255], usually with C = 1; computed in float64.
    """
    spread = _spread(mscn(_padded(luma.double(), BLOCK), 1.0), BLOCK)
    active = spread.variance >= ACTIVE_VARIANCE
    distorted = (spread.edges.amin(2) < SEGMENT_DEVIATION**2) & active
    noise = _noise(spread.variance.sqrt(), spread.centre.sqrt(), spread.surround.sqrt(), 1e-12)
    return PiqeBlocks(spread.variance, active, distorted, (noise > 0) & active)
