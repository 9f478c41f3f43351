"""MCLIR's negative loss: away from what an older self makes of the same input.

Wu et al., "Learning from History: Task-agnostic Model Contrastive Learning for Image Restoration", AAAI 2024 (arXiv
2309.06023). With a positive beside the negatives ``ContrasLoss`` is the bounded alternative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.losses.contrastive_loss import DISTANCES
from kdsr.losses.mscn import widened
from kdsr.runtime.errors import OptionError


def distance_to_negatives(
    anchor: Sequence[Tensor], negatives: Sequence[Tensor], weights: Sequence[float], distance: str = "L1"
) -> Tensor:
    """``Σ_i w_i · mean_k d(f_i(anchor), f_i(negative_k))``.

    Args:
        anchor: Features of the student's output, one (N, C, H, W) per level; they alone receive a gradient.
        negatives: Features of the K negatives, one (K · N, C, H, W) per level: the N images of negative 0 first.
        weights: One factor per level, finest level first; a level of weight 0 is left out.
        distance: ``L1`` (mean absolute difference) or ``L2`` (mean squared difference).

    Returns:
        A scalar >= 0, in float32 at least.

    Raises:
        ValueError: The numbers of levels differ, or a level's shapes do not fit together.
    """
    if not len(anchor) == len(negatives) == len(weights):
        raise ValueError(
            f"negative loss: {len(anchor)} levels of the anchor and {len(negatives)} of the negatives, but "
            f"{len(weights)} weights (option `weights`, one per level)"
        )
    measure = F.l1_loss if distance == "L1" else F.mse_loss
    total = widened(anchor[0]).new_zeros(())
    for level, (ours, theirs, weight) in enumerate(zip(anchor, negatives, weights, strict=True)):
        if theirs.shape[1:] != ours.shape[1:] or not len(theirs) or len(theirs) % len(ours):
            raise ValueError(
                f"negative loss, level {level}: anchor {tuple(ours.shape)} and negatives {tuple(theirs.shape)} do "
                "not fit"
            )
        if weight:
            parts = theirs.detach().split(len(ours))
            each = [measure(widened(ours), widened(negative)) for negative in parts]
            total = total + weight * torch.stack(each).mean()
    return total


@LOSS_REGISTRY.register()
class NegativeLoss(nn.Module):
    """``-loss_weight · distance_to_negatives``: the further, the better.

    It has no lower bound: ``loss_weight`` has to be so small that the losses beside it win.

    Args:
        loss_weight: λ (the release: 0.001).
        weights: Factor per level of the extractor, finest level first (the release, on three levels of VGG16: 0.2,
            0.3, 0.5).
        d_func: ``L1`` (the release) or ``L2``.

    Raises:
        OptionError: The distance is neither.
    """

    def __init__(
        self,
        loss_weight: float = 0.001,
        weights: Sequence[float] = (0.2, 0.3, 0.5, 0.0, 0.0),
        d_func: str = "L1",
    ) -> None:
        super().__init__()
        if d_func not in DISTANCES:
            raise OptionError(
                f"NegativeLoss: d_func {d_func!r} is unknown; it can be {' or '.join(DISTANCES)}"
            )
        self.loss_weight = loss_weight
        self.weights = tuple(float(weight) for weight in weights)
        self.distance = d_func

    def forward(self, anchor: Sequence[Tensor], negatives: Sequence[Tensor]) -> Tensor:
        """Features as in ``distance_to_negatives`` -> scalar <= 0."""
        return -self.loss_weight * distance_to_negatives(anchor, negatives, self.weights, self.distance)
