"""Mean-subtracted, contrast-normalised (MSCN) coefficients of images and feature maps, differentiable.

Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial Domain" (BRISQUE), IEEE TIP
2012, Eq. 1 to 3. BRISQUE and PIQE both start from them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RADIUS = 3  # a 7x7 window, cut at three standard deviations
_TAPS = [math.exp(-0.5 * (offset / (7 / 6)) ** 2) for offset in range(RADIUS + 1)]
# weights of one axis at distance 0 to 3 (their outer product is the window), and what lies beyond a distance
TAPS = tuple(tap / (2 * sum(_TAPS) - _TAPS[0]) for tap in _TAPS)
TAILS = tuple(sum(TAPS[distance + 1 :]) for distance in range(RADIUS))

LONGEST_MATRIX = 512


def widened(x: Tensor) -> Tensor:
    """x in float32 at least: differences of squares mean nothing in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_shifts(x: Tensor, axis: int, adjoint: bool) -> Tensor:
    """The seven taps along one axis, as shifted additions: on a CPU faster than a convolution per channel."""
    length = x.shape[axis]
    out = x * TAPS[0]
    for distance in range(1, min(RADIUS, length - 1) + 1):
        inner = length - distance
        first, last = (0, inner), (distance, inner)
        out.narrow(axis, *last).add_(x.narrow(axis, *first), alpha=TAPS[distance])
        out.narrow(axis, *first).add_(x.narrow(axis, *last), alpha=TAPS[distance])
    for distance in range(min(RADIUS, length)):
        # what lies beyond the border is the border's value: for a pixel at this distance from it, a tail
        for border, near in ((0, distance), (length - 1, length - 1 - distance)):
            target, source = (border, near) if adjoint else (near, border)
            out.narrow(axis, target, 1).add_(x.narrow(axis, source, 1), alpha=TAILS[distance])
    return out


@lru_cache(maxsize=32)
def _matrix(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The window of one axis as a band matrix: ``matrix @ column`` is the column's Gaussian mean."""
    return _by_shifts(torch.eye(length, dtype=dtype, device=device), 0, False)


def _by_matrices(x: Tensor, adjoint: bool) -> Tensor:
    down, across = (_matrix(length, x.dtype, x.device) for length in x.shape[2:])
    if adjoint:
        down, across = down.T, across.T
    with torch.autocast(x.device.type, enabled=False):
        return down @ x @ across.T


def _window(x: Tensor, *, adjoint: bool = False) -> Tensor:
    """Gaussian mean of each pixel's 7x7 neighbourhood, the border repeated; or the transpose of that map.

    (N, C, H, W) -> the same. On a GPU two products with band matrices take the place of 52 small kernels,
    unless products are rounded to TF32: E[x^2] - mu^2 does not survive that.
    """
    exact = x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    if x.is_cuda and exact and max(x.shape[2:]) <= LONGEST_MATRIX:
        return _by_matrices(x, adjoint)
    return _by_shifts(_by_shifts(x, 2, adjoint), 3, adjoint)


class _Mscn(torch.autograd.Function):
    """(x - mu) / (sigma + c), keeping three maps where autograd would keep about thirty.

    With s = sigma + c, y the result, g its gradient, G the window and h = -g y / (2 s sigma):
    dx = g / s + 2 x G'(h) - G'(g / s + 2 mu h).
    """

    @staticmethod
    def forward(ctx, x: Tensor, c: Tensor) -> Tensor:
        mean = _window(x)
        deviation = _window(x * x).sub_(mean * mean).clamp_min_(0).sqrt_()
        # A flat place is exactly 0: the signs of its rounding noise (the range is 255 c) would be counted.
        noise = 2 * 255 * torch.finfo(x.dtype).eps
        out = torch.hardshrink((x - mean).div_(deviation + c), noise)
        ctx.save_for_backward(x, mean, deviation, c)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        x, mean, deviation, c = ctx.saved_tensors
        scale = deviation + c
        direct = grad / scale
        # Where all values of a window are equal the derivative through sigma is 0 (so is x - mean); the floor
        # keeps rounding noise of such places from being divided by itself.
        through = ((mean - x) * direct).div_(scale).div_(2 * torch.maximum(deviation, 1e-4 * c))
        out = torch.addcmul(direct, _window(through, adjoint=True), x, value=2)
        return out.sub_(_window(direct.addcmul_(through, mean, value=2), adjoint=True)), None


def mscn(x: Tensor, c: float | Tensor = 1.0) -> Tensor:
    """MSCN coefficients ``(x - mu) / (sigma + c)``.

    mu and sigma are mean and standard deviation in a 7x7 Gaussian window of sigma 7/6; the border is repeated.

    Args:
        x: (N, C, H, W), any size from 1x1 on: luma in [0, 255], or feature maps.
        c: Keeps flat places from being divided by zero, > 0: 1 for luma in [0, 255] (the paper), for features
            ``contrast_constant``. It receives no gradient.

    Returns:
        (N, C, H, W) in float32 or, for float64, in float64, whatever autocast says.
    """
    x = widened(x)
    constant = torch.as_tensor(c, dtype=x.dtype, device=x.device).detach()
    # sigma and the result do not change with an offset, but sigma's rounding does: E[x^2] - mu^2
    x = x - x.detach().mean((2, 3), keepdim=True)
    return _Mscn.apply(x, constant)


def contrast_constant(reference: Tensor) -> Tensor:
    """The constant c that stands to a feature's range as 1 stands to the 255 of luma: (max - min) / 255.

    Args:
        reference: The teacher's features of one level, (N, C, H, W).

    Returns:
        A scalar without gradient; 1 where all values are equal and there is no range.
    """
    low, high = widened(reference.detach()).aminmax()
    span = (high - low) / 255
    return torch.where(span > 0, span, torch.ones_like(span))
