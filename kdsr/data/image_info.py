"""Reads an image's header: size, orientation, bit depth, and what is lost when it is decoded."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageFile, UnidentifiedImageError

# Formats that OpenCV decodes, by Pillow's names.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "JPEG2000", "AVIF", "SUN")
_EXIF_ORIENTATION = 0x0112
_ROTATED_BY_OPENCV = ("PNG", "JPEG", "MPO", "WEBP")
_TRANSPOSED = range(5, 9)  # orientations that swap height and width
_LATE_EXIF = 1 << 13  # bytes at the end of a PNG that are searched for an EXIF chunk
_MOST_PIXELS = int(os.environ.get("OPENCV_IO_MAX_IMAGE_PIXELS") or 1 << 30)  # OpenCV's limit

LOSSES = {
    "alpha": "an alpha channel, which is dropped",
    "frames": "more than one frame or page, of which the first is read",
    "cmyk": "CMYK colours, which become RGB without a colour profile",
    "orientation": "an orientation that is not applied in this format",
}


class UnfitImage(OSError):
    """A valid image that is not supported; the message gives the reason without the name."""


@dataclass(frozen=True)
class ImageInfo:
    """An image as OpenCV decodes it. Sizes are in pixels, upright (EXIF orientation applied)."""

    height: int
    width: int
    channels: int  # stored: 1 (grey), 3 (colour), with alpha 2 and 4; a palette counts as its colours
    bits: int  # stored, per channel
    white: int  # largest possible value of a decoded pixel
    losses: tuple[str, ...] = ()  # keys of LOSSES
    turned: int = 1  # EXIF orientation, which OpenCV applies only where it drops alpha

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


def probe(image: str | Path | bytes | IO[bytes]) -> ImageInfo:
    """Reads the header of an image (path, bytes or open file) without decoding pixels.

    The first kilobytes are enough for most formats.

    Raises:
        OSError: It cannot be read, or is not an image.
        UnfitImage: It has more pixels than OpenCV decodes, or values of an unsupported depth or sign.
    """
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if not isinstance(image, str | Path):
        return _probe(image)
    with open(image, "rb") as file:
        return _probe(file)


def probe_on_disk(path: str) -> ImageInfo:
    """Like :func:`probe` for a file; cached until the file changes."""
    status = os.stat(path)
    return _cached_probe(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=20_000)
def _cached_probe(path: str, _mtime: int, _size: int) -> ImageInfo:
    return probe(path)


def _probe(file: IO[bytes]) -> ImageInfo:
    try:
        file.seek(0)
        head = file.read(4096)
        header = _header(file, head)
        bits, white = _depth(header, head)
        orientation = _orientation(header, file)
    except OSError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's WebP reader has a fixed limit
        raise UnfitImage("a file of this format has too many pixels; convert it to PNG") from error
    except Exception as error:  # Pillow's errors for damaged headers have no common base
        if str(error) == "unknown pixel mode":  # TIFF
            raise UnfitImage(
                "its pixel format is not supported; convert it to unsigned 8 or 16 bits"
            ) from error
        raise UnidentifiedImageError(f"its header is damaged: {error}") from error
    width, height = header.size
    if width * height > _MOST_PIXELS:
        raise UnfitImage(f"{height}x{width} pixels are more than OpenCV decodes")
    losses = []
    if header.has_transparency_data:
        losses.append("alpha")
    if _has_frames(header):
        losses.append("frames")
    if header.mode == "CMYK":
        losses.append("cmyk")
    turned = orientation if header.format in _ROTATED_BY_OPENCV else 1
    if orientation > 1 and header.format not in (*_ROTATED_BY_OPENCV, "TIFF"):
        losses.append("orientation")
    if turned in _TRANSPOSED:  # of TIFF Pillow returns the size after rotation
        height, width = width, height
    grey = header.mode in ("1", "L", "LA", "I", "I;16", "I;16B")
    channels = (1 if grey else 3) + ("alpha" in losses)
    return ImageInfo(height, width, channels, bits, white, tuple(losses), turned)


def colour_profile(content: bytes) -> bytes | None:
    """The ICC profile in an image file's bytes, for which :func:`probe` has raised no error; None without one."""
    profile = _header(io.BytesIO(content), content[:16]).info.get("icc_profile")
    return profile if isinstance(profile, bytes) and profile else None


def _header(file: IO[bytes], head: bytes) -> ImageFile.ImageFile:
    """``PIL.Image.open`` without its pixel limit and without formats unknown to OpenCV."""
    for load_plugins in (Image.preinit, Image.init):  # the common formats, then all
        load_plugins()
        for name in _FORMATS:
            factory, accept = Image.OPEN.get(name, (None, None))
            if factory is not None and (accept is None or accept(head[:16]) is True):
                file.seek(0)
                return factory(file, "")
    raise UnidentifiedImageError("not an image")


def _orientation(header: ImageFile.ImageFile, file: IO[bytes]) -> int:
    exif = Image.Exif()
    try:
        if header.format != "PNG" or "exif" in header.info:
            exif = header.getexif()
        else:  # getexif() would decode all pixels to find an EXIF chunk after them
            exif.load(_late_exif(file))
        return int(exif.get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF data, which OpenCV ignores too
        return 1


def _late_exif(file: IO[bytes]) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _LATE_EXIF))
    tail = file.read()
    at = tail.rfind(b"eXIf")
    length = int.from_bytes(tail[at - 4 : at], "big") if at >= 4 else 0
    return tail[at + 4 : at + 4 + length]


def _depth(header: ImageFile.ImageFile, head: bytes) -> tuple[int, int]:
    """Bits per channel, and the decoded value of white in OpenCV."""
    if header.format == "PNG":
        bits = _byte_after(head, b"IHDR", 8)
        return bits, 65535 if bits == 16 else 255
    if header.format == "PPM":
        return _pnm_depth(header)
    if header.format == "TIFF":
        return _tiff_depth(header)
    bits = 8
    if header.format == "JPEG2000":
        bits = _jpeg2000_bits(head)
    elif header.format == "AVIF":
        flags = _byte_after(head, b"av1C", 2)
        bits = (12 if flags & 0x20 else 10) if flags & 0x40 else 8
    return bits, (1 << bits) - 1


def _pnm_depth(header: ImageFile.ImageFile) -> tuple[int, int]:
    if header.mode == "1":
        return 1, 255
    if header.mode == "F":
        raise UnfitImage("floating-point values are not supported; convert it to 16 bits")
    codec, _, _, args = header.tile[0]
    white = int(args[1]) if isinstance(args, tuple) else 65535 if ";16" in str(args) else 255
    # OpenCV rescales text values below 256 to 8 bits, but not binary ones.
    return white.bit_length(), max(white, 255) if codec == "ppm_plain" else white


def _tiff_depth(header: Any) -> tuple[int, int]:
    bits = max(header.tag_v2.get(258) or (1,))
    kind = max(header.tag_v2.get(339) or (1,))
    if kind != 1 or bits > 16:
        signed = {2: "signed", 3: "floating-point"}.get(kind, "unsigned")
        raise UnfitImage(f"{signed} values of {bits} bits are not supported; convert it to unsigned 16 bits")
    if bits in (2, 4) and header.tag_v2.get(262) != 3:
        raise UnfitImage(f"{bits} bits without a palette are not supported; convert it to 8 bits")
    if bits > 8:  # OpenCV shifts 10, 12 and 14 bits up
        return bits, ((1 << bits) - 1) << (16 - bits)
    return bits, 255


def _byte_after(head: bytes, mark: bytes, offset: int) -> int:
    at = head.find(mark) + len(mark) + offset
    return head[at] if mark in head and at < len(head) else 0


def _jpeg2000_bits(head: bytes) -> int:
    """Precision of the first component of the code stream."""
    precision = _byte_after(head, b"\xff\x4f\xff\x51", 38)  # bits - 1; the top bit is the sign
    if precision > 15:
        raise UnfitImage("signed values, or more than 16 bits, are not supported; convert it to 16 bits")
    return precision + 1


def _has_frames(header: Any) -> bool:
    if header.format == "TIFF":
        try:
            header.seek(1)  # n_frames would read all frames
        except EOFError:
            return False
        return True
    # Further pictures of an MPO are previews and depth maps.
    return header.format != "MPO" and bool(getattr(header, "is_animated", False))
