"""The data sets of Restormer's option files; images smaller than a training patch are mirrored, not refused."""

from __future__ import annotations

import random
from typing import Any

import cv2
import numpy as np
from basicsr.utils import img2tensor
from basicsr.utils.registry import DATASET_REGISTRY
from numpy.typing import NDArray

from kdsr.data.dataset_options import AliasOptions, FolderOptions
from kdsr.data.image_files import Pixels, decode
from kdsr.data.image_folder_dataset import FolderImages
from kdsr.data.paired_patches import PairedPatches
from kdsr.runtime.declarations import option


def mirrored(image: NDArray[Any], side: int) -> NDArray[Any]:
    """(H, W, C), extended at the bottom and the right to at least ``side``; the border itself is repeated."""
    missing = [(0, max(0, side - size)) for size in image.shape[:2]]
    return np.pad(image, [*missing, (0, 0)], "symmetric") if any(map(any, missing)) else image


@DATASET_REGISTRY.register()
class Dataset_PairedImage(PairedPatches):  # noqa: N801  Restormer's name
    """``PairedImageDataset``, whose small images are mirrored up to ``gt_size`` in training.

    From images that are large enough it cuts the patches that ``PairedImageDataset`` cuts at the same position.

    Args:
        opt: See ``PairedImageOptions``.
    """

    def image(self, role: str, path: str, name: str) -> Pixels:
        size = self.opt["gt_size"] if role == "gt" else self.opt["gt_size"] // self.opt["scale"]
        image = super().image(role, path, name)
        return image._replace(values=mirrored(image.values, size))


class GaussianOptions(FolderOptions, AliasOptions):
    dataroot_gt: str = option(None, "Folder or `.lmdb` of the clean images.", required="always")
    dataroot_lq: str | None = option(None, "Accepted from Restormer's files; has no effect.")
    filename_tmpl: str = option("{}", "Accepted from Restormer's files; has no effect.")
    sigma_type: str = option(
        None,
        "Training: how the standard deviation of the noise is drawn: `constant`, `random` (uniform in a range), or "
        "`choice` (one of a list).",
        choices=("constant", "random", "choice"),
        required="train",
    )
    sigma_range: float | list[float] = option(
        None, "Training: the number, the two ends, or the list, in levels of 255.", lowest=0, required="train"
    )
    sigma_test: float = option(
        None, "Validation and tests: the standard deviation, in levels of 255.", lowest=0
    )
    in_ch: int = option(3, "3: RGB; 1: grey.", lowest=1, highest=3)


@DATASET_REGISTRY.register()
class Dataset_GaussianDenoising(FolderImages):  # noqa: N801  Restormer's name
    """Clean images of a folder (with the folders in it) or of an LMDB, to which Gaussian noise is added.

    In training the noise of a patch is drawn anew each time. Otherwise it is that of NumPy's ``RandomState(0)`` for
    every image, as Restormer's authors validate. Noisy values are not clipped.

    Args:
        opt: See ``GaussianOptions``; ``phase`` is ``train``, ``val`` or ``test``.

    Raises:
        DataError: There is no image, or one cannot be read.
    """

    options = GaussianOptions
    role = "gt"

    def decoded(self, content: bytes | None, name: str) -> Pixels:
        if self.options.read(self.opt).in_ch == 3:
            return super().decoded(content, name)
        return Pixels(decode(content, cv2.IMREAD_GRAYSCALE, name)[..., None], 255)

    def read(self, index: int) -> Pixels:
        image = super().read(index)
        if self.opt.get("phase") != "train":
            return image
        return image._replace(values=mirrored(image.values, self.opt["gt_size"]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Loads an image.

        Returns:
            ``gt``: (C, H, W), RGB or grey in [0, 1]; ``lq``: the same with noise; ``lq_path`` and ``gt_path``.
        """
        options = self.options.read(self.opt)
        if self.opt.get("phase") == "train":
            image = self.patch(index, self.opt["gt_size"]).as_float()[..., ::-1]
            sigma: Any = options.sigma_range
            if options.sigma_type != "constant":
                sigma = random.uniform(*sigma) if options.sigma_type == "random" else random.choice(sigma)
            noise = np.random.normal(0, sigma / 255, image.shape)
        else:
            image = self.read(index).as_float()[..., ::-1]
            noise = np.random.RandomState(0).normal(0, options.sigma_test / 255, image.shape)
        gt, lq = img2tensor([image.copy(), (image + noise).astype(np.float32)], bgr2rgb=False, float32=True)
        path = self.paths[index]
        return {"lq": lq, "gt": gt, "lq_path": path, "gt_path": path}
