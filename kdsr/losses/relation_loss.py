"""Relations between the samples of a batch: distances of pairs and angles of triplets.

Park et al., "Relational Knowledge Distillation", CVPR 2019 (arXiv 1904.05068), Eq. 4 to 9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.losses.levels import check_levels, unit
from kdsr.losses.mscn import widened
from kdsr.runtime.errors import OptionError

FEWEST = 3  # two samples give no signal: their distance is its own mean, and there is no angle


def relations(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised distances and cosines of angles between samples.

    Args:
        samples: (N, C).

    Returns:
        Distances divided by the mean of the non-zero ones, (N, N); and the cosine of the angle at sample i between
        samples j and k, (N, N, N).
    """
    differences = samples.unsqueeze(0) - samples.unsqueeze(1)  # [i, j]: from i to j
    # not from squares and products, which are inaccurate for nearly equal samples
    distances = torch.linalg.vector_norm(differences, dim=2)
    mean = distances.sum() / (distances > 0).sum().clamp_min(1)
    directions = unit(differences, 2)
    with torch.autocast(samples.device.type, enabled=False):
        cosines = directions @ directions.mT
    return distances / torch.where(mean > 0, mean, torch.ones_like(mean)), cosines


def relation_distance(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The differences between the student's and the teacher's relations.

    Args:
        student: Features (N, C, H, W), averaged over positions; only they receive a gradient. With N = 2 both results
            are 0.
        teacher: (N, C', H', W').

    Returns:
        The Huber losses (delta = 1) of distances and of angles, averaged over all N^2 and N^3 as in the authors'
        release: two scalars >= 0, in at least float32.

    Raises:
        OptionError: There is only one sample.
    """
    if len(student) < 2:
        raise OptionError(
            "RKD compares distances and angles between the samples of a batch, and this batch has one: set "
            f"datasets.train.batch_size_per_gpu to {FEWEST} or more"
        )
    ours = relations(widened(student).mean((2, 3)))
    theirs = relations(widened(teacher.detach()).mean((2, 3)))
    distance, angle = (F.smooth_l1_loss(s, t) for s, t in zip(ours, theirs, strict=True))
    return distance, angle


@LOSS_REGISTRY.register()
class RKDLoss(nn.Module):
    """``relation_distance`` averaged over levels, for option files.

    Args:
        loss_weight: Weight of the term.
        distance_weight: Weight of the distances (the paper's value for metric learning and classification).
        angle_weight: Weight of the angles.
    """

    def __init__(
        self, loss_weight: float = 1.0, distance_weight: float = 25.0, angle_weight: float = 50.0
    ) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Features of each level, any channels and sizes -> scalar.

        Raises:
            OptionError: There is only one sample.
            ValueError: Numbers of levels or samples differ.
        """
        check_levels("RKD", student, teacher, channels=False, sizes=False)
        terms = []
        for s, t in zip(student, teacher, strict=True):
            distance, angle = relation_distance(s, t)
            terms.append(self.distance_weight * distance + self.angle_weight * angle)
        return self.loss_weight * torch.stack(terms).mean()
