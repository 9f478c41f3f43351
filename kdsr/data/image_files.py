"""Lists and decodes image files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from basicsr.utils import imfrombytes as _basicsr_imfrombytes
from numpy.typing import NDArray

from kdsr.data.image_info import UnfitImage, probe
from kdsr.runtime.errors import DataError

EXTENSIONS = frozenset((
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm",
    ".pbm", ".gif", ".jp2", ".avif",
))  # fmt: skip
# Errors of a single file; others (too many open files, a lost server) are not a property of the image.
_OF_ONE_FILE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip


class UnreadableImage(DataError):
    """A single image (``name``) that is missing, damaged or not an image; ``on_bad_image: skip`` replaces it."""

    def __init__(self, problems: str | Sequence[str], name: str = "") -> None:
        super().__init__(problems)
        self.name = name


def cannot_read(name: str, error: OSError) -> DataError:
    """The error for an ``OSError``: ``UnreadableImage`` if it concerns this file only, else ``DataError``."""
    message = f"Cannot read image {name}: {error.strerror or error}"
    return UnreadableImage(message, name) if error.errno in _OF_ONE_FILE else DataError(message)


def decode(content: bytes | None, flags: int, name: str) -> NDArray[Any]:
    """Decodes an image file's bytes with OpenCV (``flags``: ``IMREAD_*``).

    Raises:
        UnreadableImage: It cannot be decoded, or ``content`` is None: an LMDB has no such key.
    """
    if content is None:
        raise UnreadableImage(f"Cannot read image {name}: no such key in the LMDB", name)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error:  # the header has more pixels than OpenCV accepts
        image = None
    if image is None:
        raise UnreadableImage(
            f"Cannot read image {name}: it is damaged or not an image ({len(content)} bytes)", name
        )
    return image


class Pixels(NamedTuple):
    """A decoded image in the depth of its file: (H, W, C), BGR or grey, uint8 or uint16; ``white`` stands for 1."""

    values: NDArray[Any]
    white: int

    def as_float(self) -> NDArray[np.float32]:
        """The values in [0, 1]; of 8 bits those of BasicSR's ``imfrombytes``."""
        return self.values.astype(np.float32) / np.float32(self.white)


def decode_pixels(content: bytes | None, name: str) -> Pixels:
    """Decodes an image file's bytes to colour at full bit depth.

    Returns:
        (H, W, 3), BGR, upright (EXIF orientation applied); grey as three equal channels.

    Raises:
        UnreadableImage: It cannot be decoded, or its values are signed or floating-point numbers.
    """
    image = decode(content, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH, name)
    if image.dtype == np.uint8 and bytes(content[:1]) != b"P":  # type: ignore[index]  # all but PNM
        return Pixels(image, 255)
    try:
        if image.dtype not in (np.uint8, np.uint16):
            raise UnfitImage(f"values of type {image.dtype} are not supported; convert it to 8 or 16 bits")
        return Pixels(image, probe(bytes(content)).white)  # type: ignore[arg-type]
    except OSError as error:
        raise UnreadableImage(f"Cannot read image {name}: {error}", name) from error


def decode_color(content: bytes | None, name: str) -> NDArray[np.float32]:
    """:func:`decode_pixels`, as (H, W, 3) in [0, 1]."""
    return decode_pixels(content, name).as_float()


def imfrombytes(content: bytes, flag: str = "color", float32: bool = False) -> NDArray[Any]:
    """BasicSR's function, but keeps more than 8 bits.

    Raises:
        ValueError: The image cannot be read.
    """
    if flag != "color" or not float32:
        return _basicsr_imfrombytes(content, flag, float32)
    try:
        return decode_color(content, "")
    except DataError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Listing:
    """The content of a data set's folder, as relative paths, without hidden entries (``.name``)."""

    images: list[str]  # files that the data set reads
    left_out: list[str]  # everything else


def list_folder(folder: str | Path, recursive: bool = True) -> Listing:
    """Lists a folder; symbolic links are followed.

    Args:
        folder: The folder.
        recursive: Lists files with an image's ending, including subfolders. Otherwise all files of this folder, as
            BasicSR's data sets do.

    Raises:
        DataError: There is no such folder, or one cannot be listed.
    """
    if not os.path.isdir(folder):
        raise DataError(f"There is no folder {folder}")
    images: list[str] = []
    left_out: list[str] = []
    try:
        for name, is_file in _walk(str(folder), "", recursive, ()):
            is_image = is_file and (not recursive or os.path.splitext(name)[1].lower() in EXTENSIONS)
            (images if is_image else left_out).append(name)
    except OSError as error:
        raise DataError(f"Cannot list folder {error.filename}: {error.strerror}") from error
    return Listing(sorted(images, key=_parts), sorted(left_out, key=_parts))


def _parts(path: str) -> list[str]:
    return path.split(os.sep)


def _walk(folder: str, below: str, recursive: bool, above: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Yields the entries of a folder and whether each is a file; descends into folders if ``recursive``.

    ``below``: prefix of the names; ``above``: real paths of the parent folders.
    """
    real = os.path.realpath(folder)
    if any(os.path.commonpath((real, outer)) == real for outer in above):
        return  # a link to a parent folder
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            link = os.path if entry.is_symlink() else None  # entry.is_dir() fails for a link to itself
            if recursive and (link.isdir(entry.path) if link else entry.is_dir()):
                yield from _walk(entry.path, f"{below}{entry.name}/", recursive, (*above, real))
            else:
                yield below + entry.name, link.isfile(entry.path) if link else entry.is_file()


def list_images(folder: str | Path) -> list[Path]:
    """The images of :func:`list_folder`, which also raises its errors; a ``DataError`` if there is none."""
    images = list_folder(folder).images
    if not images:
        raise DataError(f"There is no image in {folder}")
    return [Path(folder, image) for image in images]


def read_image(path: Path) -> NDArray[np.uint8]:
    """Reads an image as 8-bit BGR or grey, (H, W, 3) or (H, W), upright (EXIF orientation applied).

    Raises:
        DataError: It cannot be read, is partly transparent, or does not have 8 bits per channel.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise cannot_read(str(path), error) from error
    image = decode(content, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH, str(path))
    try:
        info = probe(content)
    except OSError as error:
        raise DataError(f"Cannot read image {path}: {error}") from error
    if image.dtype != np.uint8 or info.white != 255:
        raise DataError(f"{path} has {info.bits} bits per channel; convert it to 8 bits")
    if "alpha" in info.losses:
        whole = decode(content, cv2.IMREAD_UNCHANGED, str(path))
        if whole.ndim == 3 and whole.shape[2] == 4 and whole[..., 3].min() < 255:
            raise DataError(f"{path} is partly transparent; flatten it first")
    return np.ascontiguousarray(image)


def sizes_match(gt: tuple[int, int], lq: tuple[int, int], scale: int, *, allow_remainder: bool) -> bool:
    """Whether a GT image has ``scale`` times the size of its LQ image; sizes are (height, width).

    ``allow_remainder`` accepts GT up to ``scale - 1`` pixels larger, from which LQ was made without cropping.
    """
    slack = scale - 1 if allow_remainder else 0
    return all(0 <= size - small * scale <= slack for size, small in zip(gt, lq, strict=True))
