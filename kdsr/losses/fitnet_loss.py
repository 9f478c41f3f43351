"""FitNet hints: the distance of the student's features to the teacher's.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015 (arXiv 1412.6550), Eq. 3. The paper first trains the
network up to the hint alone; here the loss is a term from the first step on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.losses.levels import check_choice, check_levels
from kdsr.losses.mscn import widened

CRITERIA = ("l1", "l2")


def feature_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], criterion: str = "l1") -> Tensor:
    """The mean over levels of the mean absolute (``l1``) or mean squared (``l2``) difference.

    Args:
        student: Adapted features, one (N, C, H, W) per level; only they receive a gradient.
        teacher: The teacher's features, same shapes.
        criterion: ``l1`` or ``l2`` (the paper's, without its factor 1/2).

    Returns:
        A scalar >= 0, in at least float32.

    Raises:
        ValueError: Numbers of levels or shapes differ.
    """
    check_levels("FitNet", student, teacher, channels=True)
    distance = F.l1_loss if criterion == "l1" else F.mse_loss
    terms = [distance(widened(s), widened(t.detach())) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(terms).mean()


@LOSS_REGISTRY.register()
class FitNetLoss(nn.Module):
    """``feature_distance`` for option files.

    Args:
        loss_weight: Weight of the term.
        criterion: ``l1`` or ``l2``.
    """

    def __init__(self, loss_weight: float = 1.0, criterion: str = "l1") -> None:
        super().__init__()
        check_choice("FitNetLoss", "criterion", criterion, CRITERIA)
        self.loss_weight = loss_weight
        self.criterion = criterion

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Features as in ``feature_distance`` -> scalar."""
        return self.loss_weight * feature_distance(student, teacher, self.criterion)
