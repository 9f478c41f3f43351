"""The PSNR as a loss, with which NAFNet is trained (Chen et al., ECCV 2022, arXiv 2204.04676; their PSNRLoss)."""

from __future__ import annotations

import math

import torch
from basicsr.utils.color_util import rgb2ycbcr_pt
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.runtime.errors import OptionError

_EPS = 1e-8  # equal images give -80


def negative_psnr(pred: Tensor, target: Tensor) -> Tensor:
    """The mean over the batch of ``10 log10(MSE + 1e-8)``, the negative PSNR of each image.

    Args:
        pred: (N, C, H, W) in [0, 1].
        target: Same shape.

    Returns:
        A scalar of at least -80.
    """
    errors = (pred - target).square().mean(dim=(1, 2, 3))
    return 10 / math.log(10) * torch.log(errors + _EPS).mean()


@LOSS_REGISTRY.register()
class PSNRLoss(nn.Module):
    """The negative PSNR: the mean over the batch of ``10 log10(MSE + 1e-8)``, as NAFNet is trained.

    Args:
        loss_weight: Factor of the loss.
        reduction: ``mean``.
        toY: Whether the Y channel (of YCbCr) alone is compared; images are RGB then.

    Raises:
        OptionError: Another reduction.
    """

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean", toY: bool = False) -> None:  # noqa: N803
        super().__init__()
        if reduction != "mean":
            raise OptionError(f"PSNRLoss: reduction {reduction!r} is unknown; it can be mean")
        self.loss_weight = loss_weight
        self.to_y = toY

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.to_y:
            pred, target = (rgb2ycbcr_pt(images, y_only=True) for images in (pred, target))
        return self.loss_weight * negative_psnr(pred, target)
