"""The files of stored teacher outputs: their names, their views, and how images are written."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch import Tensor

from kdsr.data.image_files import UnreadableImage, cannot_read, list_folder
from kdsr.data.image_roots import result_name
from kdsr.data.lmdb_client import LmdbClient, stored_keys
from kdsr.runtime.errors import DataError

KEY = "teacher_output"  # of an item: (3, H·scale, W·scale), RGB
TRAINING_SETS = ("PairedImageDataset", "Dataset_PairedImage", "LQImageDataset")  # whose patches it can cut
ARRAY = ".npy"


class View(NamedTuple):
    """A flip of an image, in the order of BasicSR's ``augment``: horizontal, vertical, transposition."""

    hflip: bool
    vflip: bool
    transposed: bool

    @property
    def name(self) -> str:
        return "".join(letter for letter, on in zip("hvt", self, strict=True) if on) or "plain"

    def of(self, image: Tensor) -> Tensor:
        """(..., H, W) -> (..., H, W), or (..., W, H) if it is transposed."""
        image = image.flip(-1) if self.hflip else image
        image = image.flip(-2) if self.vflip else image
        return image.transpose(-1, -2) if self.transposed else image

    def undone(self, image: Tensor) -> Tensor:
        """The inverse of ``of``."""
        image = image.transpose(-1, -2) if self.transposed else image
        image = image.flip(-2) if self.vflip else image
        return image.flip(-1) if self.hflip else image


PLAIN = View(False, False, False)


def flips_of(opt: dict[str, Any]) -> tuple[bool, bool]:
    """``use_hflip`` and ``use_rot`` of a training set."""
    default = opt.get("type") == "LQImageDataset"
    return bool(opt.get("use_hflip", default)), bool(opt.get("use_rot", default))


def views_of(opt: dict[str, Any]) -> list[View]:
    """All flips that a training set draws from."""
    hflips, others = ((False, True) if on else (False,) for on in flips_of(opt))
    return [View(h, v, t) for h in hflips for v in others for t in others]


def encode(image: Tensor, dtype: str) -> tuple[bytes, str]:
    """Encodes an output, (3, H, W), RGB; returns the bytes and the file's ending.

    ``uint8`` and ``uint16`` are PNG, clipped to [0, 1] and rounded; ``float16`` is an array of NumPy, not clipped.
    """
    pixels = image.permute(1, 2, 0).cpu().numpy()
    if dtype == "float16":
        buffer = io.BytesIO()
        np.save(buffer, pixels.astype(np.float16))
        return buffer.getvalue(), ARRAY
    rounded = (pixels[..., ::-1].clip(0, 1) * np.iinfo(dtype).max).round().astype(dtype)
    return cv2.imencode(".png", rounded, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes(), ".png"


def digest(content: bytes) -> str:
    """The hash of an LQ file in the name of its output."""
    return hashlib.sha256(content).hexdigest()[:16]


def entry_name(view: View, name: str, lq_digest: str) -> str:
    """The name of an output of ``kdsr data teacher-cache``, without the ending."""
    return f"{view.name}/{name}.{lq_digest}"


def entries_of(root: str) -> dict[str, str]:
    """The outputs in a folder or LMDB: name without the ending -> file below the folder, or key.

    Raises:
        DataError: It cannot be read, or two files differ in the ending only.
    """
    if root.endswith(".lmdb"):
        return {key: key for key in stored_keys(root)}
    listing = list_folder(root)
    found: dict[str, str] = {}
    for file in [*listing.images, *(name for name in listing.left_out if name.endswith(ARRAY))]:
        name = os.path.splitext(file)[0]
        if name in found:
            raise DataError(f"{root}: has {found[name]} and {file}; remove one")
        found[name] = file
    return found


def fingerprint(root: str) -> str:
    """A hash of the outputs' names and, for files, sizes in bytes."""
    entries = sorted(entries_of(root).values())
    sizes = (
        [] if root.endswith(".lmdb") else [os.path.getsize(os.path.join(root, entry)) for entry in entries]
    )
    return hashlib.sha256(repr((entries, sizes)).encode()).hexdigest()


class LQFiles:
    """The files of the LQ images of a data set, by index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        root = dataset.opt["dataroot_lq"]
        self.client = LmdbClient([root], ["lq"]) if root.endswith(".lmdb") else None

    def path(self, index: int, role: str = "lq") -> str:
        """The path or key; ``role`` may be ``gt``."""
        path = self.dataset.paths[index]
        return path[f"{role}_path"] if isinstance(path, dict) else path

    def name(self, index: int, role: str = "lq") -> str:
        """The path below the root, or the key, without the ending."""
        return result_name(self.path(index, role), self.dataset.opt[f"dataroot_{role}"])

    def read(self, index: int) -> bytes:
        """The bytes of a file.

        Raises:
            DataError: It cannot be read.
        """
        path = self.path(index)
        try:
            content = self.client.get(path, "lq") if self.client else Path(path).read_bytes()
        except OSError as error:
            raise cannot_read(path, error) from error
        if content is None:
            raise UnreadableImage(f"Cannot read image {path}: no such key in the LMDB", path)
        return content
