"""MTKD's wavelet loss: L1 between the sub-bands of a Haar wavelet transform of two images.

Jiang et al., "MTKD: Multi-Teacher Knowledge Distillation for Image Super-Resolution" (ECCV 2024, arXiv 2404.09571).
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from kdsr.losses.mscn import widened
from kdsr.runtime.errors import OptionError


def haar(images: Tensor) -> tuple[Tensor, Tensor]:
    """One level of the orthonormal 2-D Haar transform.

    An odd side is extended by a row or column of zeros at the bottom or the right.

    Args:
        images: (N, C, H, W).

    Returns:
        The low-pass band, (N, C, ceil(H/2), ceil(W/2)), and the three bands of details, of that size, stacked
        in a dimension of 3 behind the channels.
    """
    height, width = images.shape[-2:]
    images = F.pad(images, (0, width % 2, 0, height % 2))
    top, bottom = images[..., ::2, :], images[..., 1::2, :]
    (low, left), (up, cross) = (
        (rows[..., ::2] + rows[..., 1::2], rows[..., ::2] - rows[..., 1::2])
        for rows in (top + bottom, top - bottom)
    )
    return low / 2, torch.stack((up, left, cross), 2) / 2


def wavelet_distance(student: Tensor, teacher: Tensor, levels: int = 4) -> Tensor:
    """mean|low-pass band| of the last level + sum over levels of mean|details|, of the difference of two images.

    Args:
        student: (N, C, H, W).
        teacher: The same shape.
        levels: How many times the low-pass band is transformed again.

    Returns:
        A scalar; float32 when the images are narrower.
    """
    low = widened(student - teacher)  # the transform is linear
    total = torch.zeros((), dtype=low.dtype, device=low.device)
    for _ in range(levels):
        low, details = haar(low)
        total = total + details.abs().mean()
    return total + low.abs().mean()


@LOSS_REGISTRY.register()
class WaveletLoss(nn.Module):
    """``wavelet_distance`` as a loss of option files.

    Args:
        loss_weight: Factor of the term (MTKD: 1).
        levels: Levels of the transform, 1 or more (MTKD: 4).

    Raises:
        OptionError: ``levels`` is below 1.
    """

    def __init__(self, loss_weight: float = 1.0, levels: int = 4) -> None:
        super().__init__()
        if levels < 1:
            raise OptionError(f"WaveletLoss: levels {levels} is below 1")
        self.loss_weight = loss_weight
        self.levels = levels

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Images, (N, C, H, W) each -> scalar."""
        return self.loss_weight * wavelet_distance(student, teacher, self.levels)
