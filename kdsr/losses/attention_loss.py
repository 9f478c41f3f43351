"""Attention transfer: distances of spatial attention maps.

Zagoruyko and Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
Networks via Attention Transfer", ICLR 2017 (arXiv 1612.03928), Eq. 1 and 2 with p = 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.losses.levels import check_choice, check_levels, unit
from kdsr.losses.mscn import widened

DISTANCES = ("norm", "square")


def attention_map(features: Tensor) -> Tensor:
    """``Q / ||Q||_2`` with ``Q = sum over channels of F^2``.

    Args:
        features: (N, C, H, W).

    Returns:
        (N, H * W) >= 0, rows of norm 1 (0 for a map of zeros), in at least float32.
    """
    return unit(widened(features).square().sum(1).flatten(1), 1)


def attention_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], distance: str = "norm"
) -> Tensor:
    """The sum over levels of the distances of the attention maps.

    Args:
        student: The student's features, one (N, C, H, W) per level; only they receive a gradient.
        teacher: The teacher's features: same sizes, any number of channels.
        distance: ``norm`` (Eq. 2 without its factor beta / 2): ``||q_S - q_T||_2``, averaged over images. ``square``
            (the authors' release): the mean over images and positions of ``(q_S - q_T)^2``.

    Returns:
        A scalar >= 0; with ``norm`` at most sqrt(2) per level.

    Raises:
        ValueError: Numbers of levels or sizes differ.
    """
    check_levels("attention transfer", student, teacher, channels=False)
    terms = []
    for s, t in zip(student, teacher, strict=True):
        difference = attention_map(s) - attention_map(t.detach())
        values = torch.linalg.vector_norm(difference, dim=1) if distance == "norm" else difference.square()
        terms.append(values.mean())
    return torch.stack(terms).sum()


@LOSS_REGISTRY.register()
class AttentionTransferLoss(nn.Module):
    """``attention_distance`` for option files.

    Args:
        loss_weight: Weight of the term (paper: beta / 2 with beta = 1000 / positions of the map; the release
            multiplies ``square`` by 1000).
        distance: ``norm`` or ``square``.
    """

    def __init__(self, loss_weight: float = 1.0, distance: str = "norm") -> None:
        super().__init__()
        check_choice("AttentionTransferLoss", "distance", distance, DISTANCES)
        self.loss_weight = loss_weight
        self.distance = distance

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Features as in ``attention_distance`` -> scalar."""
        return self.loss_weight * attention_distance(student, teacher, self.distance)
