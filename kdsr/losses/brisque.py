"""BRISQUE's natural scene statistics: differentiable on feature maps, and the classic 36 numbers of an image.

Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 2012: how
an undistorted natural image's MSCN coefficients, and the products of neighbouring ones, are distributed is
known; distortions change it. Written from the paper.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdsr.losses.mscn import mscn, widened

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # (rows down, columns right), the order of the statistics
PER_SCALE = 2 + 4 * len(NEIGHBOURS)
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


def _products(x: Tensor, group: tuple[tuple[int, int], ...]) -> Tensor:
    """(N, C, H, W) -> (N, C, directions, H, W): each pixel times its neighbour, 0 where it has none.

    For one direction alone without those zeros: (N, C, 1, smaller H, smaller W).
    """
    if len(group) == 1:
        here, there = _pair(x, *group[0])
        return (here * there).unsqueeze(2)
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
        own = x.abs()
        of_pixels = torch.stack([own.sum((2, 3)), own.mul_(own).sum((2, 3))], 2)
        of_pairs = []
        for group in _groups(x):
            product = _products(x, group)
            positive = product.clamp_min(0)
            negative = positive - product
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
        done = 0
        for group in _groups(x):
            # (the counts are steps: no gradient)
            up, low, up2, low2 = of_pairs[:, :, done : done + len(group), :4, None, None].unbind(3)
            done += len(group)
            product = _products(x, group)
            # d/dp of the positive and the negative sum: half of the difference everywhere, half of the sum
            # times p's sign; d/dp of the squares: 2 p, with one factor for each sign
            slopes = product.sign().mul_((up + low) / 2).add_((up - low) / 2)
            slopes.addcmul_(product, 2 * low2).addcmul_(product.clamp_min_(0), 2 * (up2 - low2))
            for i, direction in enumerate(group):
                slope = slopes[:, :, i] if len(group) == 1 else _pair(slopes[:, :, i], *direction)[0]
                here, there = _pair(x, *direction)
                out_here, out_there = _pair(out, *direction)
                out_here.addcmul_(slope, there)
                out_there.addcmul_(slope, here)
        return out


@lru_cache(maxsize=32)
def _pairs(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How many products each direction has, (4, 1); 1 where there are none. Sent to a GPU once."""
    counts = [max(1, (height - abs(down)) * (width - right)) for down, right in NEIGHBOURS]
    return torch.tensor(counts, dtype=dtype).to(device).unsqueeze(1)


def _halved(x: Tensor) -> Tensor:
    """2x2 mean; an odd last row or column is left out, an axis of one pixel stays."""
    for axis in (2, 3):
        if x.shape[axis] > 1:
            pairs = x.narrow(axis, 0, x.shape[axis] // 2 * 2).unflatten(axis, (-1, 2))
            first, second = pairs.unbind(axis + 1)
            x = (first + second) * 0.5
    return x


def _moments(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """MSCN map -> E|y| and E[y^2], (N, C); mean, E|p|, E[p^2], left and right variance of the products,
    (N, C, 4)."""
    own, sums = _Sums.apply(y)
    absolute, square = (own / y[0, 0].numel()).unbind(2)
    means = sums[..., :4] / _pairs(*y.shape[2:], y.dtype, y.device)
    positive, negative, positive2, negative2 = means.unbind(3)
    more, less = sums[..., 4:].detach().clamp_min(1).unbind(3)
    return (
        absolute,
        square,
        positive - negative,
        positive + negative,
        positive2 + negative2,
        sums[..., 3] / less,
        sums[..., 2] / more,
    )


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
    x = widened(x)
    scales = []
    for scaled in (x, _halved(x)):
        absolute, square, mean, p_absolute, p_square, left, right = _moments(mscn(scaled, c))
        of_pixels = torch.stack([square, absolute.square() / (square + 1e-6)], 2)
        # (below 1e-20, a standard deviation of 1e-10, the root's slope is cut off)
        left, right = left.clamp_min(1e-20).sqrt(), right.clamp_min(1e-20).sqrt()
        of_pairs = torch.stack([mean, left, right, p_absolute.square() / (p_square + 1e-12)], 3)
        scales += [of_pixels, of_pairs.flatten(2)]
    return torch.cat(scales, 2)


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
    x = luma.double()
    scales = []
    for scaled in (x, _halved(x)):
        absolute, square, _, p_absolute, p_square, left2, right2 = _moments(mscn(scaled, 1.0))
        tiny = torch.finfo(x.dtype).tiny
        shape = inverse_gamma_ratio(absolute.square() / square.clamp_min(tiny))
        left, right = left2.clamp_min(tiny).sqrt(), right2.clamp_min(tiny).sqrt()
        # with g = left / right this is (g^3 + 1)(g + 1) / (g^2 + 1)^2, but right may be 0
        skew = (left**3 + right**3) * (left + right) / (left2 + right2).square().clamp_min(tiny)
        p_shape = inverse_gamma_ratio(skew * p_absolute.square() / p_square.clamp_min(tiny))
        one, two, three = _log_gammas(p_shape)
        eta = (right - left) * torch.exp(two - (one + three) / 2)
        of_pairs = torch.stack([p_shape, eta, left2, right2], 3)
        scales += [torch.stack([shape, square], 2), of_pairs.flatten(2)]
    return torch.cat(scales, 2)
