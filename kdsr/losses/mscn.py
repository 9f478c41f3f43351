"""Mean-subtracted, contrast-normalised (MSCN) coefficients of images and feature maps, differentiable.

Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial Domain" (BRISQUE), IEEE TIP
2012, Eq. 1 to 3. Both BRISQUE and PIQE are based on them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RADIUS = 3  # a 7x7 window, cut at three standard deviations
_TAPS = [math.exp(-0.5 * (offset / (7 / 6)) ** 2) for offset in range(RADIUS + 1)]
# weights of one axis at distance 0 to 3 (their outer product is the window), and the sums beyond a distance
TAPS = tuple(tap / (2 * sum(_TAPS) - _TAPS[0]) for tap in _TAPS)
TAILS = tuple(sum(TAPS[distance + 1 :]) for distance in range(RADIUS))

# Largest side of a map for which products with band matrices are fastest, on a GPU and on a CPU.
LONGEST_MATRIX = 512
LONGEST_MATRIX_CPU = 16


def widened(x: Tensor) -> Tensor:
    """x in at least float32: half precision is too coarse for differences of squares."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def interleaved(x: Tensor) -> bool:
    """Whether (N, C, H, W) has torch's channels-last memory format."""
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def row_sums(x: Tensor) -> Tensor:
    """(..., C, H, W) -> (..., H, C): sums of rows.

    Sums of whole channels-last maps are up to four times faster via row sums, because each thread then reads what it
    has written itself, not another core's cache.
    """
    return x.movedim(-3, -1).sum(-2)


def _by_shifts(x: Tensor, axis: int, adjoint: bool, out: Tensor | None = None) -> Tensor:
    """The seven taps along one axis, by shifted additions."""
    length = x.shape[axis]
    out = torch.mul(x, TAPS[0], out=out)
    for distance in range(1, min(RADIUS, length - 1) + 1):
        inner = length - distance
        first, last = (0, inner), (distance, inner)
        out.narrow(axis, *last).add_(x.narrow(axis, *first), alpha=TAPS[distance])
        out.narrow(axis, *first).add_(x.narrow(axis, *last), alpha=TAPS[distance])
    # replicated border: the border pixel contributes the tails to the pixels near it
    reach = min(RADIUS, length)
    for border, start, flipped in ((0, 0, False), (length - 1, length - reach, True)):
        tails = _tails(reach, flipped, axis, x.dtype, x.device)
        if adjoint:
            out.narrow(axis, border, 1).add_((x.narrow(axis, start, reach) * tails).sum(axis, keepdim=True))
        else:
            out.narrow(axis, start, reach).addcmul_(x.narrow(axis, border, 1), tails)
    return out


@lru_cache(maxsize=64)
def _tails(reach: int, flipped: bool, axis: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """TAILS along one axis of (N, C, H, W), for its start or (flipped) its end. Cached on the device."""
    tails = torch.tensor(TAILS[:reach], dtype=dtype).to(device)
    shape = [1, 1, reach, 1] if axis % 4 == 2 else [1, 1, 1, reach]
    return (tails.flip(0) if flipped else tails).view(shape)


@lru_cache(maxsize=32)
def _matrix(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The window of one axis as a band matrix: ``matrix @ column`` is the column's Gaussian mean."""
    return _by_shifts(torch.eye(length, dtype=dtype, device=device)[None, None], 2, False)[0, 0]


def _by_matrices(x: Tensor, adjoint: bool) -> Tensor:
    down, across = (_matrix(length, x.dtype, x.device) for length in x.shape[2:])
    if adjoint:
        down, across = down.T, across.T
    with torch.autocast(x.device.type, enabled=False):
        if not interleaved(x):
            return down @ x @ across.T
        rows = x.movedim(1, 3)
        return (across @ (down @ rows.flatten(2)).unflatten(2, rows.shape[2:])).movedim(3, 1)


@lru_cache(maxsize=64)
def _filters(maps: int, axis: int, dtype: torch.dtype) -> Tensor:
    """The seven taps along axis 2 or 3, repeated for each map."""
    taps = torch.tensor([*TAPS[:0:-1], *TAPS], dtype=dtype)
    return taps.view([1, 1, -1, 1] if axis == 2 else [1, 1, 1, -1]).repeat(maps, 1, 1, 1)


def _by_convolutions(x: Tensor, adjoint: bool) -> Tensor:
    """For channels-last maps; others would be copied by each convolution."""
    down, across = (_filters(x.shape[1], axis, x.dtype) for axis in (2, 3))
    around, full = [RADIUS] * 4, 2 * RADIUS
    with torch.autocast("cpu", enabled=False):
        if not adjoint:
            padded = F.pad(x, around, mode="replicate")
            return F.conv2d(F.conv2d(padded, down, groups=len(down)), across, groups=len(down))
        spread = F.conv2d(x, down, padding=(full, 0), groups=len(down))
        spread = F.conv2d(spread, across, padding=(0, full), groups=len(down))
        return torch.ops.aten.replication_pad2d_backward(spread, x, around)


def _convolves(x: Tensor) -> bool:
    """Whether a convolution per map is fast and as accurate as sums."""
    backend = torch.backends.mkldnn
    if x.device.type != "cpu" or x.dtype != torch.float32 or not interleaved(x):
        return False
    if not (backend.is_available() and getattr(backend, "enabled", True)):
        return False
    # since torch 2.9
    return getattr(getattr(backend, "conv", None), "fp32_precision", "none") in ("none", "ieee")


def _window(
    x: Tensor, *, adjoint: bool = False, between: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Gaussian mean in a 7x7 window with replicated border, or the adjoint; (N, C, H, W) -> the same.

    - channels-last maps on a CPU: convolutions, the fastest way;
    - a GPU: two products with band matrices instead of 52 small kernels, unless products are rounded to TF32 or less,
      which is too coarse for E[x^2] - mu^2;
    - else shifted additions.

    Args:
        between: A buffer of x's size for the additions (not x): on a CPU allocation is slower than the sums.
        out: A buffer for the result, which may be x.
    """
    exact = x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    if exact and max(x.shape[2:]) <= (LONGEST_MATRIX_CPU if x.device.type == "cpu" else LONGEST_MATRIX):
        return _by_matrices(x, adjoint)
    if _convolves(x):
        return _by_convolutions(x, adjoint)
    return _by_shifts(_by_shifts(x, 2, adjoint, between), 3, adjoint, out)


class _Mscn(torch.autograd.Function):
    """y = (x - mu) / s with s = sigma + c; saves four maps, where autograd would save about thirty.

    With g the gradient of y, G the window and h = g y / (s sigma): dx = g / s - x G'(h) + G'(mu h - g / s).
    """

    @staticmethod
    def forward(ctx, x: Tensor, c: Tensor) -> Tensor:
        # removing the mean changes only the rounding of E[x^2] - mu^2
        x = x - (row_sums(x).sum(-2) / (x.shape[2] * x.shape[3]))[..., None, None]
        square, out = x * x, torch.empty_like(x)
        mean = _window(x, between=out)
        variance = _window(square, between=out, out=square)
        scale = variance.addcmul_(mean, mean, value=-1).clamp_min_(0).sqrt_().add_(c)
        # Flat regions become exactly 0, or the signs of rounding noise would count (the range is 255 c).
        noise = 2 * 255 * torch.finfo(x.dtype).eps
        torch.sub(x, mean, out=out).div_(scale)
        torch.hardshrink(out, noise, out=out)
        ctx.save_for_backward(x, mean, scale, out, c)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        x, mean, scale, y, c = ctx.saved_tensors
        direct = grad / scale
        # In flat windows y and the derivative through sigma are 0; the floor avoids dividing rounding noise by itself.
        # The noise grows with the range of x, which may exceed the teacher's, from which c is derived.
        deviation = (scale - c).clamp_min_(1e-4 * torch.maximum(c, contrast_constant(x)))
        through = torch.mul(direct, y).div_(deviation)
        of_square = _window(through, adjoint=True, between=deviation)
        through.mul_(mean).sub_(direct)
        of_mean = _window(through, adjoint=True, between=deviation, out=through)
        return direct.addcmul_(of_square, x, value=-1).add_(of_mean), None


def mscn(x: Tensor, c: float | Tensor = 1.0) -> Tensor:
    """MSCN coefficients ``(x - mu) / (sigma + c)``.

    mu and sigma are mean and standard deviation in a 7x7 Gaussian window of sigma 7/6, with replicated border.

    Args:
        x: (N, C, H, W) of any size: luma in [0, 255], or feature maps.
        c: Stabilising constant > 0, without gradient: 1 for luma in [0, 255] (the paper), ``contrast_constant`` for
            features.

    Returns:
        (N, C, H, W) in float32 or, for float64, in float64, regardless of autocast.
    """
    x = widened(x)
    constant = torch.as_tensor(c, dtype=x.dtype, device=x.device).detach()
    return _Mscn.apply(x, constant)


def contrast_constant(reference: Tensor) -> Tensor:
    """The constant c for the range of features, corresponding to 1 for luma: (max - min) / 255.

    Args:
        reference: Features of one level, (N, C, H, W): the teacher's for c.

    Returns:
        A scalar without gradient; 1 if all values are equal.
    """
    reference = reference.detach()
    if interleaved(reference):
        reference = reference.movedim(1, -1)  # avoids a copy
    low, high = (widened(end) for end in reference.aminmax())
    span = (high - low) / 255
    return torch.where(span > 0, span, torch.ones_like(span))
