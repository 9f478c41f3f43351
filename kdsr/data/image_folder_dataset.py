"""Unpaired images, on which a network that reconstructs its input (a VQGAN) is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from basicsr.data.data_util import paths_from_lmdb
from basicsr.utils import FileClient
from basicsr.utils.registry import DATASET_REGISTRY
from torch import Tensor
from torch.utils.data import Dataset

from kdsr.data.dataset_options import FolderOptions
from kdsr.data.image_files import Pixels, list_images
from kdsr.data.lmdb_client import LmdbClient
from kdsr.data.patches import as_tensors, crop_together, draw_flips, flip
from kdsr.data.ram_cache import CachedImages, files_of
from kdsr.data.resize import mod_crop
from kdsr.runtime.declarations import option
from kdsr.runtime.errors import DataError


class FolderImages(CachedImages, Dataset):
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
        if backend.pop("type") == "lmdb":
            self.file_client = LmdbClient([root], [self.role])
            self.paths: list[str] = paths_from_lmdb(root)
        else:
            self.file_client = FileClient("disk", **backend)
            self.paths = [str(path) for path in list_images(root)]

    def __len__(self) -> int:
        return len(self.paths)

    def shown(self, index: int) -> str:
        """An image's name for messages."""
        return files_of(self, index)[self.role][1]

    def read(self, index: int) -> Pixels:
        """A decoded image; raises a ``DataError`` if it cannot be read."""
        return self.pixels(self.role, *files_of(self, index)[self.role])

    def patch(self, index: int, size: int, because: str = "") -> Pixels:
        """A random square crop, randomly flipped (``use_hflip``) and rotated (``use_rot``).

        Draws random numbers in the order of BasicSR's paired data sets: the same seed gives the same patch.

        Raises:
            DataError: The image cannot be read, or is smaller; ``because`` is the reason for the size.
        """
        image = self.read(index)
        height, width = image.values.shape[:2]
        if min(height, width) < size:
            raise DataError(
                f"gt_size {self.opt['gt_size']}{because} is larger than the image {self.shown(index)} "
                f"({height}x{width}): lower it or remove the image"
            )
        options = self.options.read(self.opt)
        patches = crop_together([image], size, 1)
        return flip(patches, draw_flips(options.use_hflip, options.use_rot))[0]

    def as_tensor(self, image: Pixels) -> Tensor:
        """(H, W, 3), BGR -> (3, H, W), RGB in [0, 1], or of whole numbers where the pipeline converts them."""
        return as_tensors([image], {}, self.whole_numbers and self.opt.get("phase") == "train")[0]


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
            whole = self.read(index)
            image = whole._replace(values=mod_crop(whole.values, self.options.read(self.opt).multiple_of))
            if 0 in image.values.shape:
                raise DataError(f"{self.shown(index)} is smaller than multiple_of")
        tensor, path = self.as_tensor(image), self.paths[index]
        return {"lq": tensor, "gt": tensor, "lq_path": path, "gt_path": path}
