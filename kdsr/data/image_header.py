"""Sizes of encoded images without decoding them."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from PIL import Image

_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = range(5, 9)  # the orientations that swap height and width


def image_size(image: str | Path | IO[bytes]) -> tuple[int, int]:
    """Reads the size of an encoded image from its header, as OpenCV would decode it (EXIF orientation
    applied).

    Args:
        image: File name or open file.

    Returns:
        Height and width.

    Raises:
        OSError: It cannot be read, or is no image (``PIL.UnidentifiedImageError`` is an OSError).
    """
    with Image.open(image) as header:
        width, height = header.size
        turned = header.getexif().get(_EXIF_ORIENTATION, 1) in _TRANSPOSED
    return (width, height) if turned else (height, width)


def sizes_match(gt: tuple[int, int], lq: tuple[int, int], scale: int, *, allow_remainder: bool) -> bool:
    """Whether a GT image has ``scale`` times the size of its LQ image.

    Args:
        gt: Height and width.
        lq: Height and width.
        scale: Upscaling factor.
        allow_remainder: Accepts a GT up to ``scale - 1`` pixels larger, as LQ images made of uncropped GT
            are.
    """
    slack = scale - 1 if allow_remainder else 0
    return all(0 <= size - small * scale <= slack for size, small in zip(gt, lq, strict=True))
