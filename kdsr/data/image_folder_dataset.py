"""Unpaired images, on which a network that reconstructs its input (a VQGAN) is trained."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from basicsr.data.data_util import paths_from_lmdb
from basicsr.data.transforms import augment
from basicsr.utils import FileClient, img2tensor
from basicsr.utils.registry import DATASET_REGISTRY
from torch import Tensor
from torch.utils.data import Dataset

from kdsr.data.dataset_options import FolderOptions
from kdsr.data.image_files import cannot_read, decode_color, list_images
from kdsr.data.lmdb_client import LmdbClient
from kdsr.data.resize import mod_crop
from kdsr.runtime.declarations import option
from kdsr.runtime.errors import DataError


class FolderImages(Dataset):
    """Base of unpaired data sets: images of a folder, including subfolders, or of an LMDB.

    Args:
        opt: ``dataroot_ROLE`` and ``io_backend`` (default: by the root's name) are used.

    Raises:
        DataError: There is no image.
    """

    role: ClassVar[str]  # "gt" or "lq"
    options: ClassVar[type[FolderOptions]]

    def __init__(self, opt: Mapping[str, Any]) -> None:
        self.opt = opt
        root = opt[f"dataroot_{self.role}"]
        backend = dict(opt.get("io_backend") or {"type": "lmdb" if root.endswith(".lmdb") else "disk"})
        self._client: LmdbClient | FileClient
        if backend.pop("type") == "lmdb":
            self._client = LmdbClient([root], [self.role])
            self.paths: list[str] = paths_from_lmdb(root)
            self._shown = f"{root}: {{}}"
        else:
            self._client = FileClient("disk", **backend)
            self.paths = [str(path) for path in list_images(root)]
            self._shown = "{}"

    def __len__(self) -> int:
        return len(self.paths)

    def shown(self, index: int) -> str:
        """An image's name for messages."""
        return self._shown.format(self.paths[index])

    def read(self, index: int) -> np.ndarray:
        """Reads an image as (H, W, 3), BGR in [0, 1]; raises a ``DataError`` if it cannot be read."""
        try:
            content = self._client.get(self.paths[index], self.role)
        except OSError as error:
            raise cannot_read(self.shown(index), error) from error
        return self.decoded(content, self.shown(index))

    def decoded(self, content: bytes | None, name: str) -> np.ndarray:
        return decode_color(content, name)

    def patch(self, index: int, size: int, because: str = "") -> np.ndarray:
        """A random square crop, randomly flipped (``use_hflip``) and rotated (``use_rot``).

        Draws random numbers in the order of BasicSR's paired data sets: the same seed gives the same patch.

        Raises:
            DataError: The image cannot be read, or is smaller; ``because`` is the reason for the size.
        """
        image = self.read(index)
        height, width = image.shape[:2]
        if min(height, width) < size:
            raise DataError(
                f"gt_size {self.opt['gt_size']}{because} is larger than the image {self.shown(index)} "
                f"({height}x{width}): lower it or remove the image"
            )
        top, left = random.randint(0, height - size), random.randint(0, width - size)
        crop = image[top : top + size, left : left + size].copy()
        options = self.options.read(self.opt)
        return augment(crop, options.use_hflip, options.use_rot)


def as_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3), BGR -> (3, H, W), RGB."""
    return img2tensor(np.ascontiguousarray(image), bgr2rgb=True, float32=True)


class ImageFolderOptions(FolderOptions):
    dataroot_gt: str = option(None, "Folder or `.lmdb` of the images.")
    multiple_of: int = option(1, "Whole images are cropped to multiples of it.", lowest=1)


@DATASET_REGISTRY.register()
class ImageFolderDataset(FolderImages):
    """Images of a folder, including subfolders, or of an LMDB, without LQ counterparts.

    In training an item is a random square crop, randomly flipped and rotated; otherwise the whole image, cropped at
    the bottom and right to a multiple of ``multiple_of``.

    Args:
        opt: See ``ImageFolderOptions``; ``phase`` is ``train``, ``val`` or ``test``.

    Raises:
        DataError: There is no image, one cannot be read, or one is smaller than its crop.
    """

    options = ImageFolderOptions
    role = "gt"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Loads an image.

        Returns:
            ``lq`` and ``gt``: the same (3, H, W) tensor, RGB in [0, 1]; ``lq_path`` and ``gt_path``.
        """
        if self.opt.get("phase") == "train":
            image = self.patch(index, self.opt["gt_size"])
        else:
            image = mod_crop(self.read(index), self.options.read(self.opt).multiple_of)
            if 0 in image.shape:
                raise DataError(f"{self.shown(index)} is smaller than multiple_of")
        tensor, path = as_tensor(image), self.paths[index]
        return {"lq": tensor, "gt": tensor, "lq_path": path, "gt_path": path}
