"""Image files: which there are, their sizes without decoding them, their pixels."""

from __future__ import annotations

import errno
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdsr.runtime.errors import DataError

EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm")
)
_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = range(5, 9)  # the orientations that swap height and width
# What the system says of one file; anything else (too many open files, a lost server) is no property of an image.
_OF_ONE_FILE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip


class UnreadableImage(DataError):
    """A single image that is absent, damaged or no image; ``on_bad_image: skip`` passes over such ones.

    Args:
        problems: The message, as for every error.
        name: The image's path, or its LMDB and key.
    """

    def __init__(self, problems: str | Sequence[str], name: str = "") -> None:
        super().__init__(problems)
        self.name = name


def cannot_read(name: str, error: OSError) -> DataError:
    """The error for a file that the system would not read: of this image alone, or of more than that."""
    message = f"Cannot read image {name}: {error.strerror or error}"
    return UnreadableImage(message, name) if error.errno in _OF_ONE_FILE else DataError(message)


def decode(content: bytes | None, flags: int, name: str) -> NDArray[Any]:
    """Decodes an image file's bytes with OpenCV.

    Args:
        content: The bytes; None where an LMDB has no such key.
        flags: OpenCV's ``IMREAD_*``.
        name: What to call the image in messages.

    Raises:
        UnreadableImage: It cannot be decoded.
    """
    if content is None:
        raise UnreadableImage(f"Cannot read image {name}: no such key in the LMDB", name)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error:  # its header states more pixels than OpenCV takes
        image = None
    if image is None:
        raise UnreadableImage(
            f"Cannot read image {name}: it is damaged or not an image ({len(content)} bytes)", name
        )
    return image


def list_images(folder: str | Path) -> list[Path]:
    """Lists the images of a folder and the folders in it, hidden ones aside, ordered by path.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}")
    images = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    if not images:
        raise DataError(f"There is no image in {folder}")
    return sorted(images)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Reads an image as 8-bit BGR or grey, (H, W, 3) or (H, W), upright (EXIF orientation applied).

    Raises:
        DataError: It cannot be read, is partly transparent, or has other than 8 bits per channel.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise cannot_read(str(path), error) from error
    image = decode(content, cv2.IMREAD_UNCHANGED, str(path))
    if image.dtype != np.uint8:
        raise DataError(f"{path} has {8 * image.dtype.itemsize} bits per channel; convert it to 8 bits")
    if image.ndim == 3 and image.shape[2] == 4:
        if image[..., 3].min() < 255:
            raise DataError(f"{path} is partly transparent; flatten it first")
        image = image[..., :3]
    try:
        with Image.open(io.BytesIO(content)) as header:
            orientation = _orientation(header)
    except (OSError, Image.DecompressionBombError):
        orientation = (
            1  # OpenCV could decode it: a format that Pillow does not know, or a size it does not like
        )
    return np.ascontiguousarray(_upright(image, orientation), np.uint8)


def _orientation(header: Image.Image) -> int:
    """The EXIF orientation that is still to be applied."""
    if header.format == "TIFF":
        return 1  # OpenCV turns the pixels whatever the flags, Pillow states the size of the turned image
    # Pillow decodes a whole PNG to look for EXIF at its end, where no camera writes any.
    has_exif = header.format != "PNG" or "exif" in header.info
    return int(header.getexif().get(_EXIF_ORIENTATION, 1)) if has_exif else 1


def _upright(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undoes an EXIF orientation, which cv2.IMREAD_UNCHANGED leaves alone."""
    if orientation in _TRANSPOSED:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def image_size(image: str | Path | IO[bytes]) -> tuple[int, int]:
    """Reads the size of an encoded image from its header, as OpenCV would decode it (EXIF orientation
    applied).

    Args:
        image: File name or open file.

    Returns:
        Height and width.

    Raises:
        OSError: It cannot be read, or is no image (``PIL.UnidentifiedImageError`` is an OSError).
        PIL.Image.DecompressionBombError: Its header states more pixels than Pillow takes for sound.
    """
    with Image.open(image) as header:
        width, height = header.size
        turned = _orientation(header) in _TRANSPOSED
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
