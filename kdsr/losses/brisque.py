"""BRISQUE's natural scene statistics, differentiable on feature maps.

Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 2012: distortions
change the distributions of a natural image's MSCN coefficients and of the products of neighbouring ones. Written from
the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdsr.losses.mscn import interleaved, mscn, row_sums, widened

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # (rows down, columns right), in the order of the statistics

AT_ONCE = 2**17  # largest number of values for which a CPU computes all four directions at once (cache)


def _pair(x: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Views of the pixels that have the neighbour, and of these neighbours."""
    height, width = x.shape[2:]
    above, below = x[:, :, : height - abs(down)], x[:, :, abs(down) :]
    here, there = (above, below) if down >= 0 else (below, above)
    return here[..., : width - right], there[..., right:]


def _groups(x: Tensor) -> list[tuple[tuple[int, int], ...]]:
    """Directions that are computed at once: all on a GPU, to launch few kernels."""
    at_once = x.device.type != "cpu" or x.numel() <= AT_ONCE
    return [NEIGHBOURS] if at_once else [(direction,) for direction in NEIGHBOURS]


def _memory(x: Tensor, maps: int, directions: int) -> list[Tensor]:
    """Flat buffers for maps, reused by the directions: on a CPU allocation is slower than computation."""
    return list(x.new_empty(maps, directions * x.numel()).unbind())


def _part(memory: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
    """The start of a flat buffer as a tensor of this shape, (directions, N, C, H, W), with x's memory format."""
    part = memory[: math.prod(shape)]
    if interleaved(x):
        return part.view(*shape[:2], *shape[3:], shape[2]).movedim(-1, 2)
    return part.view(*shape)


def _products(x: Tensor, group: tuple[tuple[int, int], ...], memory: Tensor) -> Tensor:
    """(N, C, H, W) -> (directions, N, C, H, W), in ``memory``: each pixel times its neighbour, 0 without a neighbour.

    For a single direction without these zeros: (1, N, C, smaller H, smaller W).
    """
    if len(group) == 1:
        here, there = _pair(x, *group[0])
        out = _part(memory, x, (1, *here.shape))
        torch.mul(here, there, out=out[0])
        return out
    out = _part(memory, x, (len(group), *x.shape)).zero_()
    for product, direction in zip(out, group, strict=True):
        here, there = _pair(x, *direction)
        torch.mul(here, there, out=_pair(product, *direction)[0])
    return out


class _Sums(torch.autograd.Function):
    """(N, C, H, W) -> (2, N, C): sums of |x| and x^2; and (6, 4, N, C), per direction: sums of positive products, of
    absolute negative products, of the squares of each, and the number of each.

    Saves only the input, where autograd would save about forty maps of its size.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        own = x.abs()
        # without zeros, as usual, negative = not positive (on a GPU the check would need a sync)
        zeros = x.device.type != "cpu" or not own.numel() or not own.amin() > 0
        of_pixels = torch.stack([row_sums(own), row_sums(own.mul_(own))]).sum(-2)
        of_pairs = []
        groups = _groups(x)
        memory = _memory(x, 3, len(groups[0]))
        pairs = _pairs(x.shape[2], x.shape[3], x.dtype, x.device)
        for group, existing in zip(groups, pairs.split(len(groups[0])), strict=True):
            product = _products(x, group, memory[0])
            parts = [_part(part, x, product.shape) for part in memory[1:]]
            positive = torch.clamp_min(product, 0, out=parts[0])
            negative = torch.sub(positive, product, out=parts[1])
            difference = [row_sums(product.sign_())] if zeros else []
            rows = [row_sums(positive), row_sums(negative)]
            rows += [row_sums(torch.mul(positive, positive, out=product)), row_sums(negative.mul_(negative))]
            rows += [row_sums(positive.sign_()), *difference]
            found = torch.stack(rows).sum(-2)
            more = found[4:5]
            less = more - found[5:] if zeros else existing - more
            of_pairs.append(torch.cat([found[:5], less]))
        return of_pixels, torch.cat(of_pairs, 1) if len(of_pairs) > 1 else of_pairs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_pixels: Tensor, of_pairs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        absolute, square = of_pixels[..., None, None]
        out = x.sign().mul_(absolute).addcmul_(x, 2 * square)
        groups = _groups(x)
        memory = _memory(x, 3, len(groups[0]))
        done = 0
        for group in groups:
            # the counts have no gradient
            up, low, up2, low2 = of_pairs[:4, done : done + len(group), ..., None, None]
            done += len(group)
            product = _products(x, group, memory[0])
            parts = [_part(part, x, product.shape) for part in memory[1:]]
            # For a product p, d/dp is up + 2 p up2 if p > 0 and -low + 2 p low2 if p < 0: half of their sum, plus half
            # of their difference times the sign of p.
            sign = torch.sign(product, out=parts[0])
            difference = torch.addcmul((up + low) / 2, product, up2 - low2, out=parts[1])
            slopes = torch.addcmul((up - low) / 2, product, up2 + low2, out=product).addcmul_(
                sign, difference
            )
            for slope, direction in zip(slopes, group, strict=True):
                if len(group) > 1:
                    slope = _pair(slope, *direction)[0]
                here, there = _pair(x, *direction)
                out_here, out_there = _pair(out, *direction)
                out_here.addcmul_(slope, there)
                out_there.addcmul_(slope, here)
        return out


@lru_cache(maxsize=64)
def _pairs(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Number of products per direction in a map, (4, 1, 1). Cached on the device."""
    pairs = [[[max(0, height - abs(down)) * max(0, width - right)]] for down, right in NEIGHBOURS]
    return torch.tensor(pairs, dtype=dtype).to(device)


def _halved(x: Tensor) -> Tensor:
    """2x2 mean; drops an odd last row or column, keeps an axis of one pixel."""
    return F.avg_pool2d(x, [min(2, size) for size in x.shape[2:]])


class _Moments(NamedTuple):
    """Moments at both scales of the MSCN map y, (2, N, C), and of its neighbour products p, (4, 2, N, C)."""

    absolute: Tensor  # E|y|
    square: Tensor  # E[y^2]
    mean: Tensor
    p_absolute: Tensor
    p_square: Tensor
    left: Tensor  # variance of the negative products around 0
    right: Tensor  # variance of the positive products around 0


def _moments(x: Tensor, c: float | Tensor) -> _Moments:
    """Moments of the MSCN maps of x, (N, C, H, W), at scales 1 and 1/2."""
    of_pixels, of_pairs = [], []
    for y in (mscn(scaled, c) for scaled in (x, _halved(x))):
        height, width = y.shape[2:]
        of_image, of_products = _Sums.apply(y)
        positive, negative, positive2, negative2, more, less = of_products.unbind()
        of_pixels.append([total / (height * width) for total in of_image.unbind()])
        pairs = _pairs(height, width, y.dtype, y.device).clamp_min(1)
        mean, absolute, square = (positive - negative, positive + negative, positive2 + negative2)
        left, right = negative2 / less.detach().clamp_min(1), positive2 / more.detach().clamp_min(1)
        of_pairs.append([mean / pairs, absolute / pairs, square / pairs, left, right])
    pixels_of_both, pairs_of_both = (zip(*scales, strict=True) for scales in (of_pixels, of_pairs))
    return _Moments(*map(torch.stack, pixels_of_both), *(torch.stack(each, 1) for each in pairs_of_both))


def _in_order(of_pixels: list[Tensor], of_pairs: list[Tensor]) -> Tensor:
    """(2, N, C) each and (4, 2, N, C) each -> (N, C, 36): scale 1 first; per scale pixels, then directions."""
    pairs = torch.stack(of_pairs, 1).flatten(0, 1).movedim(1, 0)
    return torch.cat([torch.stack(of_pixels, 1), pairs], 1).flatten(0, 1).permute(1, 2, 0)


def natural_scene_statistics(x: Tensor, c: float | Tensor) -> Tensor:
    """The BRISQUE extractor B of SLKD: 36 differentiable statistics of every channel.

    At scales 1 and 1/2 (2x2 mean), of the MSCN map y:

    - 0, 1: ``E[y^2]`` and the generalised Gaussian's shape statistic ``(E|y|)^2 / E[y^2]``;
    - 2 to 17: of the products p of neighbours, right (0, 1), below (1, 0), below right (1, 1), above right (-1, 1):
      mean, standard deviation of the negative ones, of the positive ones, ``(E|p|)^2 / E[p^2]``.

    BRISQUE's own features are functions of these. The denominators of the shape statistics have 1e-6 (y) or 1e-12 (p)
    added: a flat channel gives 0 with a finite gradient.

    Args:
        x: Feature maps (N, C, H, W) of any size.
        c: The MSCN constant, ``contrast_constant`` of the teacher's features.

    Returns:
        (N, C, 36) in float32 (float64 for float64), scale 1 first.
    """
    m = _moments(widened(x), c)
    # limits the gradient of the square root below a standard deviation of 1e-10
    left, right = m.left.clamp_min(1e-20).sqrt(), m.right.clamp_min(1e-20).sqrt()
    return _in_order(
        [m.square, m.absolute.square() / (m.square + 1e-6)],
        [m.mean, left, right, m.p_absolute.square() / (m.p_square + 1e-12)],
    )
