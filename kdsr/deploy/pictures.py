"""Reads pictures for restoration and writes the results, with what a data set drops: alpha, 16 bits, colour profile."""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdsr.data.image_files import Pixels, UnreadableImage, cannot_read, decode, decode_pixels
from kdsr.data.image_info import ImageInfo, colour_profile, probe
from kdsr.data.patches import as_tensors
from kdsr.models.image_metrics import as_image
from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.errors import DataError

_JPEG_QUALITY = 95
_KIND_OF_PROFILE = slice(16, 20)  # of an ICC profile's header: the colour space


class Format(StrEnum):
    """File formats of results."""

    png = "png"
    tif = "tif"
    jpg = "jpg"


@dataclass(frozen=True)
class Picture:
    """A decoded image file.

    Attributes:
        pixels: (H, W, 3), BGR, upright, as the data sets read it: grey as three equal channels.
        alpha: (H, W), upright, in the depth of the file; None without an alpha channel.
        grey: Whether the file is grey.
        profile: The file's ICC profile.
        info: The header.
    """

    pixels: Pixels
    alpha: NDArray[Any] | None
    grey: bool
    profile: bytes | None
    info: ImageInfo

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.pixels.values.shape[:2]
        return height, width

    def in_8_bits(self) -> NDArray[np.uint8]:
        """The pixels as they are measured: (H, W, 3), BGR."""
        return np.rint(self.pixels.as_float() * 255).astype(np.uint8)

    def as_tensor(self, channels: int) -> Tensor:
        """The input of a network with 1 or 3 channels, in [0, 1]: (1, 3, H, W), RGB; of a grey file (1, 1, H, W) if
        ``channels`` is 1."""
        image = as_tensors([self.pixels], {})[0][None]
        return image[:, :1] if self.grey and channels == 1 else image


def read_picture(path: Path) -> Picture:
    """Reads an image file in any format and depth that the data sets read.

    Raises:
        DataError: It is missing or damaged, or its values or its alpha channel are not supported.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise cannot_read(str(path), error) from error
    pixels = decode_pixels(content, str(path))
    try:
        info = probe(content)
    except OSError as error:
        raise UnreadableImage(f"Cannot read image {path}: {error}", str(path)) from error
    alpha = None
    if "alpha" in info.losses:
        values, alpha = _with_alpha(content, info, path)
        pixels = pixels._replace(values=values)
    grey = info.channels in (1, 2)
    return Picture(pixels, alpha, grey, colour_profile(content), info)


def _with_alpha(content: bytes, info: ImageInfo, path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Colours and alpha, upright."""
    try:
        if content[:2] in (b"II", b"MM") and info.bits == 8:  # TIFF, whose colours OpenCV multiplies by alpha
            image = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))[..., [2, 1, 0, 3]]
        else:
            image = decode(content, cv2.IMREAD_UNCHANGED, str(path))
    except (OSError, Image.DecompressionBombError):
        image = np.empty(0)
    if image.ndim != 3 or image.shape[2] != 4:
        raise UnreadableImage(
            f"Cannot read image {path}: its alpha channel cannot be read; convert it to PNG", str(path)
        )
    if info.turned in (5, 6, 7, 8):  # EXIF orientations, which are not applied to an image with alpha
        image = image.swapaxes(0, 1)
    if info.turned in (2, 3, 6, 7):
        image = image[:, ::-1]
    if info.turned in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image[..., :3]), np.ascontiguousarray(image[..., 3])


@dataclass(frozen=True)
class Result:
    """A restored picture, ready to be written.

    Attributes:
        values: (H, W, 3), BGR, or (H, W), grey; uint8, or uint16 of a picture with more than 8 bits.
        alpha: (H, W), of the same type; None of a picture without.
        profile: ICC profile of the picture.
    """

    values: NDArray[Any]
    alpha: NDArray[Any] | None
    profile: bytes | None

    def in_8_bits(self) -> NDArray[np.uint8]:
        """The values as they are measured."""
        if self.values.dtype == np.uint8:
            return self.values
        return np.rint(self.values * (255 / 65535)).astype(np.uint8)


def result_of(picture: Picture, output: Tensor, scale: int) -> Result:
    """A network's output as a picture in the depth of its input; alpha is enlarged by bicubic interpolation.

    Args:
        picture: The input.
        output: (1, C, H·scale, W·scale) in [0, 1], RGB or grey.
        scale: Upscaling factor.
    """
    deep = picture.pixels.white > 255
    values = _in_16_bits(output) if deep else as_image(output)
    alpha = picture.alpha
    if alpha is not None:
        if deep:
            alpha = np.rint(alpha * (65535 / picture.pixels.white)).clip(0, 65535).astype(np.uint16)
        if scale > 1:
            alpha = cv2.resize(alpha, values.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    space = (picture.profile or b"")[_KIND_OF_PROFILE]
    fits = space == (b"GRAY" if values.ndim == 2 else b"RGB ")
    return Result(values, alpha, picture.profile if fits else None)


def _in_16_bits(output: Tensor) -> NDArray[np.uint16]:
    """Rounds (1, C, H, W) in [0, 1]; by planes, as float32 takes twice the memory of the result."""
    planes = [
        np.rint(plane.float().clamp(0, 1).mul(65535).cpu().numpy()).astype(np.uint16) for plane in output[0]
    ]
    return np.asarray(cv2.merge(planes[::-1])) if len(planes) == 3 else planes[0]


def write_result(result: Result, path: Path, format: Format) -> None:
    """Writes a result atomically.

    Raises:
        DataError: The format has no alpha channel or no 16 bits, which the result needs.
        TrainingError: It cannot be written (disk full, no permission).
    """
    values, alpha = result.values, result.alpha
    if format is Format.jpg and (alpha is not None or values.dtype != np.uint8):
        what = "an alpha channel" if alpha is not None else "more than 8 bits per channel"
        raise DataError(f"{path}: its input has {what}, which JPEG has not; use --format png")
    if alpha is not None:
        colours = cv2.cvtColor(values, cv2.COLOR_GRAY2BGR) if values.ndim == 2 else values
        values = np.dstack([colours, alpha])
    ending = f".{format.value}"
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if format is Format.jpg else []
    if result.profile is not None and format is not Format.tif:
        kinds, contents = [cv2.IMAGE_METADATA_ICCP], [np.frombuffer(result.profile, np.uint8)]
        encoded = cv2.imencodeWithMetadata(ending, values, kinds, contents, quality)[1]
    else:
        encoded = cv2.imencode(ending, values, quality)[1]
    atomic_write(path, lambda file: file.write(encoded.tobytes()))
