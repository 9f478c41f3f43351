"""BasicSR's ``PairedImageDataset`` with the same training patches, cut before they are converted to float."""

from __future__ import annotations

from typing import Any

import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils import FileClient

from kdsr.data.image_files import Pixels
from kdsr.data.lmdb_client import LmdbClient
from kdsr.data.patches import FLIPS, as_tensors, crop_together, draw_flips, flip
from kdsr.data.ram_cache import CachedImages, files_of


class PairedPatches(CachedImages, PairedImageDataset):
    """Takes the place of ``PairedImageDataset`` in training, which converts whole images to cut a patch of each.

    Args:
        opt: See ``PairedImageOptions``.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        if opt["io_backend"]["type"] == "lmdb":
            self.file_client = LmdbClient([self.lq_folder, self.gt_folder], ["lq", "gt"])
        else:
            self.file_client = FileClient("disk")

    def image(self, role: str, path: str, name: str) -> Pixels:
        """The image from which a patch is cut."""
        return self.pixels(role, path, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Loads a pair.

        Returns:
            ``lq``: (3, H, W), RGB in [0, 1]; ``gt``: (3, H·scale, W·scale); ``lq_path`` and ``gt_path``. With
            ``whole_numbers`` see ``kdsr.data.patches.to_device``.
        """
        opt = self.opt
        if opt["phase"] != "train":
            return super().__getitem__(index)
        files = files_of(self, index)  # LQ first
        images = [self.image(role, *file) for role, file in files.items()]
        patches = crop_together(images, opt["gt_size"] // opt["scale"], opt["scale"])
        flips = draw_flips(opt["use_hflip"], opt["use_rot"])
        item: dict[str, Any] = {}
        if self.whole_numbers and opt.get("flips_on_device"):
            item[FLIPS] = torch.tensor(flips)
        else:
            patches = flip(patches, flips)
        tensors = as_tensors(patches, opt, self.whole_numbers)
        return dict(zip(files, tensors, strict=True)) | item | self.paths[index]
