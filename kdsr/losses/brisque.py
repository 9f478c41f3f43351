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

from kdsr.losses.mscn import mscn, widened

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # (rows down, columns right), the order of the statistics
SHAPES = (
    0.2,
    10.0,
)  # the generalised Gaussian's shapes that are told apart (the range of the authors' search)


def _pair(x: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Views of x and of its neighbours; pixels without that neighbour are left out."""
    height, width = x.shape[2:]
    above, below = x[:, :, : height - abs(down)], x[:, :, abs(down) :]
    here, there = (above, below) if down >= 0 else (below, above)
    return here[..., : width - right], there[..., right:]


def _groups(x: Tensor) -> list[tuple[tuple[int, int], ...]]:
    """Directions that are dealt with at once: all on a GPU (fewer kernels), one on a CPU (fits its cache)."""
    return [NEIGHBOURS] if x.is_cuda else [(direction,) for direction in NEIGHBOURS]


def _part(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """The beginning of flat memory as a tensor."""
    return memory[: math.prod(shape)].view(*shape)


def _memory(x: Tensor, maps: int) -> Sequence[Tensor | None]:
    """So many maps' flat memory, which the directions share: on a CPU to take it costs more than to fill it."""
    return [None] * maps if len(_groups(x)) == 1 else x.new_empty(maps, x.numel()).unbind()


def _products(x: Tensor, group: tuple[tuple[int, int], ...], memory: Tensor | None) -> Tensor:
    """(N, C, H, W) -> (N, C, directions, H, W): each pixel times its neighbour, 0 where it has none.

    For one direction alone without those zeros, (N, C, 1, smaller H, smaller W), and in ``memory``.
    """
    if memory is not None:
        here, there = _pair(x, *group[0])
        return torch.mul(here, there, out=_part(memory, here.shape)).unsqueeze(2)
    out = x.new_zeros(*x.shape[:2], len(group), *x.shape[2:])
    for i, direction in enumerate(group):
        here, there = _pair(x, *direction)
        _pair(out[:, :, i], *direction)[0].copy_(here).mul_(there)
    return out


class _Sums(torch.autograd.Function):
    """(N, C, H, W) -> (N, C, 2): the sums of |x| and x^2; and (N, C, 4, 6): of each direction's products the
    sums of the positive ones, of the negative ones (as a number >= 0), of their squares, and how many of each
    there are.

    Autograd would keep some forty maps of the input's size until the backward pass; this keeps the input.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        memory = _memory(x, 3)
        own = x.abs()
        of_pixels = torch.stack([own.sum((2, 3)), own.mul_(own).sum((2, 3))], 2)
        of_pairs = []
        for group in _groups(x):
            product = _products(x, group, memory[0])
            parts = [None if part is None else _part(part, product.shape) for part in memory[1:]]
            positive = torch.clamp_min(product, 0, out=parts[0])
            negative = torch.sub(positive, product, out=parts[1])
            more = product.sign_().sum((3, 4))
            sums = [positive.sum((3, 4)), negative.sum((3, 4))]
            sums += [torch.mul(positive, positive, out=product).sum((3, 4))]
            sums += [negative.mul_(negative).sum((3, 4))]
            count = positive.sign_().sum((3, 4))
            of_pairs.append(torch.stack([*sums, count, count - more], 3))
        return of_pixels, torch.cat(of_pairs, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_pixels: Tensor, of_pairs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        absolute, square = (of_pixels[:, :, i, None, None] for i in range(2))
        out = x.sign().mul_(absolute).addcmul_(x, 2 * square)
        memory = _memory(x, 2)
        done = 0
        for group in _groups(x):
            # (the counts are steps: no gradient)
            up, low, up2, low2 = of_pairs[:, :, done : done + len(group), :4, None, None].unbind(3)
            done += len(group)
            product = _products(x, group, memory[0])
            # d/dp of the positive and the negative sum: half of the difference everywhere, half of the sum
            # times p's sign; d/dp of the squares: 2 p, with one factor for each sign
            slopes = torch.sign(product, out=None if memory[1] is None else _part(memory[1], product.shape))
            slopes.mul_((up + low) / 2).add_((up - low) / 2)
            slopes.addcmul_(product, 2 * low2).addcmul_(product.clamp_min_(0), 2 * (up2 - low2))
            for i, direction in enumerate(group):
                slope = slopes[:, :, i] if len(group) == 1 else _pair(slopes[:, :, i], *direction)[0]
                here, there = _pair(x, *direction)
                out_here, out_there = _pair(out, *direction)
                out_here.addcmul_(slope, there)
                out_there.addcmul_(slope, here)
        return out


@lru_cache(maxsize=32)
def _counts(
    sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """How many pixels each scale has, (scales,), and how many products each direction, (scales, 4, 1); 1 where
    there are none. Sent to a GPU once."""
    pixels = [height * width for height, width in sizes]
    pairs = [
        [[max(1, (height - abs(down)) * (width - right))] for down, right in NEIGHBOURS]
        for height, width in sizes
    ]
    return torch.tensor(pixels, dtype=dtype).to(device), torch.tensor(pairs, dtype=dtype).to(device)


def _halved(x: Tensor) -> Tensor:
    """2x2 mean; an odd last row or column is left out, an axis of one pixel stays."""
    return F.avg_pool2d(x, [min(2, size) for size in x.shape[2:]])


class _Moments(NamedTuple):
    """At both scales: of the MSCN map y, (N, C, 2), and of its neighbour products p, (N, C, 2, 4)."""

    absolute: Tensor  # E|y|
    square: Tensor  # E[y^2]
    mean: Tensor
    p_absolute: Tensor
    p_square: Tensor
    left: Tensor  # variance of the negative products about 0
    right: Tensor  # and of the positive ones


def _moments(x: Tensor, c: float | Tensor) -> _Moments:
    """Of the MSCN maps of x, (N, C, H, W), at scale 1 and at scale 1/2."""
    scales = [mscn(scaled, c) for scaled in (x, _halved(x))]
    of_pixels, of_pairs = zip(*(_Sums.apply(y) for y in scales), strict=True)
    pixels, pairs = _counts(tuple((y.shape[2], y.shape[3]) for y in scales), x.dtype, x.device)
    absolute, square = torch.stack(of_pixels, 3).div(pixels).unbind(2)
    sums = torch.stack(of_pairs, 2)
    more, less = sums[..., 4:].detach().clamp_min(1).unbind(4)
    positive, negative, positive2, negative2 = (sums[..., :4] / pairs).unbind(4)
    return _Moments(
        absolute,
        square,
        positive - negative,
        positive + negative,
        positive2 + negative2,
        sums[..., 3] / less,
        sums[..., 2] / more,
    )


def _in_order(of_pixels: list[Tensor], of_pairs: list[Tensor]) -> Tensor:
    """(N, C, 2) each and (N, C, 2, 4) each -> (N, C, 36): scale 1 first, in it the pixels, then each direction."""
    return torch.cat([torch.stack(of_pixels, 3), torch.stack(of_pairs, 4).flatten(3)], 3).flatten(2)


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
