"""Makes GT and LQ images of one photograph, whole or cut into sub-images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kdsr.data.resize import imresize, mod_crop
from kdsr.runtime.errors import OptionError

Image = NDArray[np.uint8]
GT = 1  # key of the ground truth among the scales
LQ = 0  # key of a degraded image of the ground truth's size


@dataclass(frozen=True)
class Cutting:
    """How photographs are cut into training images. Sizes are in pixels of the ground truth.

    Args:
        scales: Factors of the LQ images.
        multiple_of: Height and width of the ground truth are cropped to a multiple of this, a multiple of every scale.
        crop: Side of the square sub-images, a multiple of ``multiple_of``; 0 for whole images. A photograph is not cut
            in a dimension in which it is smaller.
        step: Distance of neighbouring sub-images, a multiple of ``multiple_of``; 0: about half of ``crop``.
        thresh: A remainder at the right or lower border up to this size is dropped; a larger one gets a sub-image that
            ends at the border.

    Raises:
        OptionError: A size is not such a multiple, so that GT and LQ would not be aligned.
    """

    scales: tuple[int, ...]
    multiple_of: int
    crop: int = 0
    step: int = 0
    thresh: int = 0

    def __post_init__(self) -> None:
        multiple = math.lcm(*self.scales)
        if self.multiple_of < 1 or self.multiple_of % multiple:
            raise OptionError(
                f"Images are cropped to multiples of {self.multiple_of}: must be a multiple of {multiple}"
            )
        scales = f" for scales {', '.join(map(str, self.scales))}" if self.scales else ""
        for name, what, size in (("crop", "whole images", self.crop), ("step", "half of crop", self.step)):
            if size < 0 or size % self.multiple_of:
                raise OptionError(
                    f"{name} {size}: must be 0 ({what}) or a multiple of {self.multiple_of}{scales}"
                )

    def starts(self, length: int) -> list[int]:
        """Start positions of sub-images along a dimension of ``length`` pixels."""
        if self.crop == 0 or length <= self.crop:
            return [0]
        last = length - self.crop
        half = max(self.crop // 2 // self.multiple_of, 1) * self.multiple_of
        starts = list(range(0, last + 1, self.step or half))
        if last - starts[-1] > self.thresh:
            starts.append(last)
        return starts


def cut(
    image: Image, cutting: Cutting, degraded: Image | None = None
) -> Iterator[tuple[str, dict[int, Image]]]:
    """Makes the LQ images of a photograph and cuts all of them at the same positions.

    Cutting comes last, so that resizing sees the real pixels beyond a sub-image's border.

    Args:
        image: (H, W) or (H, W, C), uint8.
        cutting: The sizes.
        degraded: An LQ image of the same shape, which is cut too.

    Yields:
        The suffix of the sub-image's name (``_s001``, row by row; empty for whole images) and its images by scale,
        with the ground truth under :data:`GT` and the degraded image under :data:`LQ`.
    """
    whole = {GT: mod_crop(image, cutting.multiple_of)}
    if 0 in whole[GT].shape:
        return
    for scale in cutting.scales:
        whole[scale] = imresize(whole[GT], 1 / scale)
    if degraded is not None:
        whole[LQ] = mod_crop(degraded, cutting.multiple_of)
    height, width = whole[GT].shape[:2]
    number = 0
    for top in cutting.starts(height):
        for left in cutting.starts(width):
            number += 1
            bottom, right = (min(start + cutting.crop, size) if cutting.crop else size
                             for start, size in ((top, height), (left, width)))  # fmt: skip
            pieces = {}
            for key, part in whole.items():
                scale = GT if key == LQ else key
                pieces[key] = part[top // scale : bottom // scale, left // scale : right // scale]
            yield f"_s{number:03d}" if cutting.crop else "", pieces


def encode_png(image: Image) -> bytes:
    """Encodes an image as PNG with fast compression (the level of BasicSR's LMDBs)."""
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
