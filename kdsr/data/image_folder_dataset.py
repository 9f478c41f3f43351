"""Crops of any images: what a network that reconstructs its input (a VQGAN) is trained on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import NoneType
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from basicsr.data.data_util import paths_from_lmdb
from basicsr.data.transforms import augment
from basicsr.utils import FileClient, img2tensor
from basicsr.utils.registry import DATASET_REGISTRY
from torch.utils.data import Dataset

from kdsr.data.image_files import cannot_read, decode, list_images
from kdsr.data.lmdb_client import LmdbClient
from kdsr.data.sub_images import mod_crop
from kdsr.runtime.errors import DataError


@DATASET_REGISTRY.register()
class ImageFolderDataset(Dataset):
    """Images of a folder (with the folders in it) or of an LMDB, without a degraded counterpart.

    In training an item is a random square crop, flipped and rotated at random; otherwise it is the whole
    image, cropped at the bottom and the right to a multiple of ``multiple_of``.

    Args:
        opt: Options:

            - ``dataroot_gt``: a folder, or an LMDB whose name ends in ``.lmdb``
            - ``io_backend`` (absent: as the name of ``dataroot_gt`` says)
            - ``phase``: ``train``, ``val`` or ``test``
            - ``gt_size``: side of the crops; required in training
            - ``use_hflip``, ``use_rot``: true unless set
            - ``multiple_of``: 1 unless set

    Raises:
        DataError: There is no image, one cannot be read, or one is smaller than what is cropped from it.
    """

    OPTION_KEYS: ClassVar[dict[str, Any]] = {
        "dataroot_gt": str,
        "gt_size": (int, NoneType),
        "use_hflip": bool,
        "use_rot": bool,
        "multiple_of": int,
    }

    def __init__(self, opt: Mapping[str, Any]) -> None:
        self.opt = opt
        root = opt["dataroot_gt"]
        backend = dict(opt.get("io_backend") or {"type": "lmdb" if root.endswith(".lmdb") else "disk"})
        self._client: LmdbClient | FileClient
        if backend.pop("type") == "lmdb":
            self._client = LmdbClient([root], ["gt"])
            self.paths: list[str] = paths_from_lmdb(root)
            self._shown = f"{root}: {{}}"
        else:
            self._client = FileClient("disk", **backend)
            self.paths = [str(path) for path in list_images(root)]
            self._shown = "{}"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Loads an image.

        Returns:
            ``lq`` and ``gt``: the same (3, H, W) tensor, RGB in [0, 1]; ``lq_path`` and ``gt_path``.
        """
        path = self.paths[index]
        image: np.ndarray = self._read(path).astype(np.float32) / 255.0
        if self.opt.get("phase") == "train":
            image = self._crop(image, self._shown.format(path))
        else:
            image = mod_crop(image, self.opt.get("multiple_of", 1))
            if 0 in image.shape:
                raise DataError(f"{self._shown.format(path)} is smaller than multiple_of")
        tensor: torch.Tensor = img2tensor(np.ascontiguousarray(image), bgr2rgb=True, float32=True)
        return {"lq": tensor, "gt": tensor, "lq_path": path, "gt_path": path}

    def _read(self, path: str) -> np.ndarray:
        name = self._shown.format(path)
        try:
            content = self._client.get(path, "gt")
        except OSError as error:
            raise cannot_read(name, error) from error
        return decode(content, cv2.IMREAD_COLOR, name)

    def _crop(self, image: np.ndarray, name: str) -> np.ndarray:
        size = self.opt["gt_size"]
        height, width = image.shape[:2]
        if min(height, width) < size:
            raise DataError(
                f"gt_size {size} is larger than the image {name} ({height}x{width}): lower it or remove the "
                "image"
            )
        top, left = random.randint(0, height - size), random.randint(0, width - size)
        crop = image[top : top + size, left : left + size].copy()
        return augment(crop, self.opt.get("use_hflip", True), self.opt.get("use_rot", True))
