"""LQ images alone: what a student learns from where only its teacher knows the answer."""

from __future__ import annotations

from types import NoneType
from typing import Any, ClassVar

from basicsr.utils.registry import DATASET_REGISTRY

from kdsr.data.image_folder_dataset import FolderImages, as_tensor


@DATASET_REGISTRY.register()
class LQImageDataset(FolderImages):
    """LQ images of a folder (with the folders in it) or of an LMDB, without ground truth.

    In training an item is a random square patch, flipped and rotated at random: the one that ``PairedImageDataset``
    cuts at the same position of the same images. Otherwise it is the whole image. (BasicSR's ``SingleImageDataset``
    gives whole images in training too.)

    Args:
        opt: Options:

            - ``dataroot_lq``: a folder, or an LMDB whose name ends in ``.lmdb``
            - ``io_backend`` (absent: as the name of ``dataroot_lq`` says)
            - ``phase``: ``train``, ``val`` or ``test``
            - ``gt_size``: side that the ground truth of a patch would have; required in training. The patch itself
              has ``gt_size / scale``, so that the option means what it means for pairs
            - ``scale``: 1 unless set
            - ``use_hflip``, ``use_rot``: true unless set

    Raises:
        DataError: There is no image, one cannot be read, or one is smaller than a patch.
    """

    OPTION_KEYS: ClassVar[dict[str, Any]] = {
        "dataroot_lq": str,
        "gt_size": (int, NoneType),
        "use_hflip": bool,
        "use_rot": bool,
    }
    GIVES_GT: ClassVar[bool] = False
    role = "lq"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Loads an image.

        Returns:
            ``lq``: (3, H, W), RGB in [0, 1]; ``lq_path``.
        """
        if self.opt.get("phase") == "train":
            scale = self.opt.get("scale") or 1
            size = self.opt["gt_size"] // scale
            image = self.patch(index, size, f" (LQ patches of {size})" if scale > 1 else "")
        else:
            image = self.read(index)
        return {"lq": as_tensor(image), "lq_path": self.paths[index]}
