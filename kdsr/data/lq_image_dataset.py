"""LQ images without ground truth, for distillation from the teacher's output only."""

from __future__ import annotations

from typing import Any, ClassVar

from basicsr.utils.registry import DATASET_REGISTRY

from kdsr.data.dataset_options import FolderOptions
from kdsr.data.image_folder_dataset import FolderImages
from kdsr.runtime.declarations import option


class LQImageOptions(FolderOptions):
    dataroot_lq: str = option(None, "Folder or `.lmdb` of the LQ images.")


@DATASET_REGISTRY.register()
class LQImageDataset(FolderImages):
    """LQ images of a folder, including subfolders, or of an LMDB, without ground truth.

    In training an item is a random square patch, randomly flipped and rotated, the same that ``PairedImageDataset``
    cuts with the same seed. Otherwise it is the whole image. (BasicSR's ``SingleImageDataset`` loads whole images in
    training too.)

    Args:
        opt: See ``LQImageOptions``. As for pairs, the patch has a side of ``gt_size / scale``.

    Raises:
        DataError: There is no image, one cannot be read, or one is smaller than a patch.
    """

    options = LQImageOptions
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
        return {"lq": self.as_tensor(image), "lq_path": self.paths[index]}
