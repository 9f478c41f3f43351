"""BRISQUE's natural scene statistics: differentiable on feature maps, and the classic 36 numbers of an image.

Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 2012: how
an undistorted natural image's MSCN coefficients, and the products of neighbouring ones, are distributed is
known; distortions change it. Written from the paper.
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

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # (rows down, columns right), the order of the statistics

SHAPES = (0.2, 10.0)  # the generalised Gaussian's that are told apart (the range of the authors' search)
# Up to how many values all four directions are dealt with at once on a CPU: beyond, cache counts for more than the
# number of operations.
AT_ONCE = 2**17


def _pair(x: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Views of x and of its neighbours; pixels without that neighbour are left out."""
    height, width = x.shape[2:]
    above, below = x[:, :, : height - abs(down)], x[:, :, abs(down) :]
    here, there = (above, below) if down >= 0 else (below, above)
    return here[..., : width - right], there[..., right:]


def _groups(x: Tensor) -> list[tuple[tuple[int, int], ...]]:
    """Directions that are dealt with at once: all on a GPU, which wants few kernels."""
    at_once = x.device.type != "cpu" or x.numel() <= AT_ONCE
    return [NEIGHBOURS] if at_once else [(direction,) for direction in NEIGHBOURS]


def _memory(x: Tensor, maps: int, directions: int) -> list[Tensor]:
    """So many maps' flat memory, which the directions share: on a CPU to take it costs more than to fill it."""
    return list(x.new_empty(maps, directions * x.numel()).unbind())


def _part(memory: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
    """The beginning of flat memory as a tensor of this shape, (directions, N, C, H, W), laid out as x is."""
    part = memory[: math.prod(shape)]
    if interleaved(x):
        return part.view(*shape[:2], *shape[3:], shape[2]).movedim(-1, 2)
    return part.view(*shape)


def _products(x: Tensor, group: tuple[tuple[int, int], ...], memory: Tensor) -> Tensor:
    """(N, C, H, W) -> (directions, N, C, H, W), in ``memory``: each pixel times its neighbour, 0 where it has none.

    For one direction alone without those zeros, (1, N, C, smaller H, smaller W).
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
    """(N, C, H, W) -> (2, N, C): the sums of |x| and x^2; and (6, 4, N, C): of each direction's products the sums of
    the positive ones, of the negative ones (as a number >= 0), of their squares, and how many of each there are.

    Autograd would keep some forty maps of the input's size until the backward pass; this keeps the input.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        own = x.abs()
        # without zeros, and most maps have none, what is not positive is negative (a GPU would have to be asked)
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
            # (the counts are steps: no gradient)
            up, low, up2, low2 = of_pairs[:4, done : done + len(group), ..., None, None]
            done += len(group)
            product = _products(x, group, memory[0])
            parts = [_part(part, x, product.shape) for part in memory[1:]]
            # With p a product, d/dp is up + 2 p up2 where it is positive and -low + 2 p low2 where it is negative:
            # half of their sum everywhere, half of their difference times p's sign.
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
    """How many products each direction has in a map, (4, 1, 1). Sent to a GPU once."""
    pairs = [[[max(0, height - abs(down)) * max(0, width - right)]] for down, right in NEIGHBOURS]
    return torch.tensor(pairs, dtype=dtype).to(device)


def _halved(x: Tensor) -> Tensor:
    """2x2 mean; an odd last row or column is left out, an axis of one pixel stays."""
    return F.avg_pool2d(x, [min(2, size) for size in x.shape[2:]])


class _Moments(NamedTuple):
    """At both scales: of the MSCN map y, (2, N, C), and of its neighbour products p, (4, 2, N, C)."""

    absolute: Tensor  # E|y|
    square: Tensor  # E[y^2]
    mean: Tensor
    p_absolute: Tensor
    p_square: Tensor
    left: Tensor  # variance of the negative products about 0
    right: Tensor  # and of the positive ones


def _moments(x: Tensor, c: float | Tensor) -> _Moments:
    """Of the MSCN maps of x, (N, C, H, W), at scale 1 and at scale 1/2."""
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
    """(2, N, C) each and (4, 2, N, C) each -> (N, C, 36): scale 1 first, in it the pixels, then each direction."""
    pairs = torch.stack(of_pairs, 1).flatten(0, 1).movedim(1, 0)
    return torch.cat([torch.stack(of_pixels, 1), pairs], 1).flatten(0, 1).permute(1, 2, 0)


def natural_scene_statistics(x: Tensor, c: float | Tensor) -> Tensor:
    """The BRISQUE extractor B of SLKD: 36 differentiable statistics of every channel.

    At scale 1 and at scale 1/2 (2x2 mean), of the MSCN map y:

    - 0, 1: ``E[y^2]`` and the generalised Gaussian's shape statistic ``(E|y|)^2 / E[y^2]``;
    - 2 to 17: of the products p of neighbours, right (0, 1), below (1, 0), below right (1, 1), above right
      (-1, 1): mean, standard deviation of the negative ones, of the positive ones, ``(E|p|)^2 / E[p^2]``.

    BRISQUE's own numbers are functions of these, see ``brisque_features``. The shape statistic's denominator
    has 1e-6 (y) or 1e-12 (p) added to it: that of a flat channel is 0 and its gradient is finite.

    Args:
        x: Feature maps (N, C, H, W), any size from 1x1 on.
        c: The MSCN constant, ``contrast_constant`` of the teacher's features.

    Returns:
        (N, C, 36) in float32 (float64 for float64), scale 1 first.
    """
    m = _moments(widened(x), c)
    # (below 1e-20, a standard deviation of 1e-10, the root's slope is cut off)
    left, right = m.left.clamp_min(1e-20).sqrt(), m.right.clamp_min(1e-20).sqrt()
    return _in_order(
        [m.square, m.absolute.square() / (m.square + 1e-6)],
        [m.mean, left, right, m.p_absolute.square() / (m.p_square + 1e-12)],
    )


def _log_gammas(shape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.lgamma(1 / shape), torch.lgamma(2 / shape), torch.lgamma(3 / shape)


def gamma_ratio(shape: Tensor) -> Tensor:
    """(E|y|)^2 / E[y^2] of a generalised Gaussian: ``G(2/a)^2 / (G(1/a) G(3/a))``, growing from 0 to 3/4."""
    one, two, three = _log_gammas(shape)
    return torch.exp(2 * two - one - three)


def inverse_gamma_ratio(ratio: Tensor) -> Tensor:
    """The shape a in [0.2, 10] whose ``gamma_ratio`` is the given one (float64), differentiable.

    A ratio beyond those of the two ends gets that end, and no gradient.
    """
    low, high = (torch.full_like(ratio, math.log(end)).detach() for end in SHAPES)
    for _ in range(48):  # bisection to 1e-14
        middle = (low + high) / 2
        below = gamma_ratio(middle.exp()) < ratio.detach()
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    shape = ((low + high) / 2).exp()
    one, two, three = (torch.digamma(k / shape) * k for k in (1, 2, 3))
    value = gamma_ratio(shape)
    slope = value * (one + three - 2 * two) / shape.square()
    ends = [gamma_ratio(torch.full_like(shape, end)) for end in SHAPES]
    inside = (ratio > ends[0]) & (ratio < ends[1])
    # one Newton step: a change of 1e-14 in the value, and the derivative of the inverse function
    return shape + torch.where(inside, (ratio - value) / slope, torch.zeros_like(ratio))


def brisque_features(luma: Tensor) -> Tensor:
    """BRISQUE's 36 features of an image (Mittal et al. 2012, Table I), by matching moments.

    Per scale (1, then 1/2 by 2x2 mean): a and sigma^2 of the generalised Gaussian of the MSCN coefficients;
    then, of the asymmetric generalised Gaussian of each neighbour product (right, below, below right, above
    right): a, eta, sigma_l^2, sigma_r^2, with eta = (sigma_r - sigma_l) G(2/a) / sqrt(G(1/a) G(3/a)).
    Shapes a are found to rounding, within [0.2, 10]. Neighbours beyond the border do not count, and the
    border does not wrap around.

    Args:
        luma: (N, C, H, W) in [0, 255], usually with C = 1; computed in float64.

    Returns:
        (N, C, 36) in float64.
    """
    m = _moments(luma.double(), 1.0)
    tiny = torch.finfo(m.square.dtype).tiny
    shape = inverse_gamma_ratio(m.absolute.square() / m.square.clamp_min(tiny))
    left, right = m.left.clamp_min(tiny).sqrt(), m.right.clamp_min(tiny).sqrt()
    # with g = left / right this is (g^3 + 1)(g + 1) / (g^2 + 1)^2, but right may be 0
    skew = (left**3 + right**3) * (left + right) / (m.left + m.right).square().clamp_min(tiny)
    p_shape = inverse_gamma_ratio(skew * m.p_absolute.square() / m.p_square.clamp_min(tiny))
    one, two, three = _log_gammas(p_shape)
    eta = (right - left) * torch.exp(two - (one + three) / 2)
    return _in_order([shape, m.square], [p_shape, eta, m.left, m.right])
