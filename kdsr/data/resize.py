"""Bicubic resizing of 8-bit images as Matlab's ``imresize`` does it.

The LQ images of super-resolution benchmarks are made with it. It differs from other bicubic filters:

- the kernel (Keys, "Cubic convolution interpolation", 1981, with a = -0.5) is stretched in downscaling (antialiasing);
- an 8-bit image is rounded to 8 bits after each of the two passes, rows first (BasicSR's ``imresize`` keeps
  floating-point numbers between the passes);
- the image is mirrored at its border (the Matlab releases that made Set5 and Set14 repeat the last pixel).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Border = Literal["symmetric", "replicate"]

_KERNEL_WIDTH = 4


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel, zero beyond |x| = 2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def bicubic_taps(
    length: int, out_length: int, scale: float, border: Border
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Source indices and weights of each output pixel along one axis, both (out_length, taps); weights sum to 1."""
    shrink = min(scale, 1.0)
    width = _KERNEL_WIDTH / shrink
    # centre of each output pixel in input coordinates, where pixel 0 covers [-0.5, 0.5]
    centre = (np.arange(out_length) + 0.5) / scale - 0.5
    first = np.floor(centre - width / 2).astype(np.intp)
    index = first[:, None] + np.arange(math.ceil(width) + 2)
    weight = shrink * _cubic(shrink * (centre[:, None] - index))
    weight /= weight.sum(axis=1, keepdims=True)
    used = weight.any(axis=0)
    index, weight = index[:, used], weight[:, used]
    if border == "replicate":
        return np.clip(index, 0, length - 1), weight
    index %= 2 * length
    return np.where(index < length, index, 2 * length - 1 - index), weight


def _resize_rows(
    image: NDArray[np.uint8], out_length: int, scale: float, border: Border
) -> NDArray[np.uint8]:
    index, weight = bicubic_taps(len(image), out_length, scale, border)
    total = np.zeros((out_length, *image.shape[1:]))
    for tap in range(index.shape[1]):
        total += weight[:, tap].reshape(-1, *[1] * (image.ndim - 1)) * image[index[:, tap]]
    return np.clip(np.floor(total + 0.5), 0, 255).astype(np.uint8)


def imresize(image: NDArray[np.uint8], scale: float, border: Border = "symmetric") -> NDArray[np.uint8]:
    """Matlab's ``imresize(image, scale)`` (bicubic, antialiased) for an 8-bit image.

    Args:
        image: (H, W) or (H, W, C), uint8.
        scale: Factor for both dimensions.
        border: ``symmetric`` as in today's Matlab, or ``replicate`` as in the releases that made the LQ images of
            Set5 and Set14 (differs in the two outermost pixels of the result).

    Returns:
        (ceil(H·scale), ceil(W·scale)) or the same with C, uint8.

    Raises:
        TypeError: The image is not uint8.
        ValueError: The scale is not positive, or the image is neither (H, W) nor (H, W, C).
    """
    if image.dtype != np.uint8:
        raise TypeError(f"imresize takes uint8 images, not {image.dtype}")
    if scale <= 0 or image.ndim not in (2, 3):
        raise ValueError(f"imresize: scale {scale}, image of shape {image.shape}")
    # 9 * (1 / 3) must be 3 despite rounding
    height, width = (math.ceil(round(size * scale, 9)) for size in image.shape[:2])
    image = _resize_rows(image, height, scale, border)
    return np.ascontiguousarray(_resize_rows(image.swapaxes(0, 1), width, scale, border).swapaxes(0, 1))


def mod_crop(image: NDArray[Any], multiple_of: int) -> NDArray[Any]:
    """Crops at the bottom and right to multiples of a number."""
    height, width = (size - size % multiple_of for size in image.shape[:2])
    return image[:height, :width]
