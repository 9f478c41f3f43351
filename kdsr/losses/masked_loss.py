"""Response distillation in which a pixel counts less, the further the teacher is from the ground truth there."""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.losses.mscn import widened
from kdsr.runtime.errors import OptionError


def teacher_mask(teacher: Tensor, gt: Tensor, error_scale: float) -> Tensor:
    """w = exp(-e / error_scale), e the mean absolute error of the teacher over the channels of a pixel.

    Args:
        teacher: The teacher's output, (N, C, H, W).
        gt: The ground truth, the same shape.
        error_scale: The error at which the weight is 1/e, in the range of the images.

    Returns:
        (N, 1, H, W) in (0, 1], without gradient; float32 when the images are narrower.
    """
    error = widened(teacher.detach() - gt).abs().mean(1, keepdim=True)
    return torch.exp(-error / error_scale)


@LOSS_REGISTRY.register()
class MaskedLoss(nn.Module):
    """mean(w · |S − T|): L1 between student and teacher, weighted per pixel with ``teacher_mask``.

    The weights are not normalised: an image on which the teacher is wrong everywhere counts less than others.

    Args:
        loss_weight: Factor of the term.
        error_scale: Error of the teacher, in the range [0, 1] of images, at which the weight of a pixel is 1/e.

    Raises:
        OptionError: ``error_scale`` is not above 0.
    """

    def __init__(self, loss_weight: float = 1.0, error_scale: float = 0.05) -> None:
        super().__init__()
        if not error_scale > 0:
            raise OptionError(f"MaskedLoss: error_scale {error_scale} is not above 0")
        self.loss_weight = loss_weight
        self.error_scale = error_scale

    def forward(self, student: Tensor, teacher: Tensor, gt: Tensor) -> Tensor:
        """Images, (N, C, H, W) each -> scalar."""
        mask = teacher_mask(teacher, gt, self.error_scale)
        return self.loss_weight * (mask * widened(student - teacher.detach()).abs()).mean()
