"""MCLIR's negative loss: increases the distance to the outputs of an older student.

Wu et al., "Learning from History: Task-agnostic Model Contrastive Learning for Image Restoration", AAAI 2024 (arXiv
2309.06023). ``ContrasLoss``, with positives too, is the bounded alternative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.losses.contrastive_loss import DISTANCES
from kdsr.losses.levels import check_choice, levels_needed
from kdsr.losses.mscn import widened


def distance_to_negatives(
    anchor: Sequence[Tensor], negatives: Sequence[Tensor], weights: Sequence[float], distance: str = "L1"
) -> Tensor:
    """``Σ_i w_i · mean_k d(f_i(anchor), f_i(negative_k))``.

    Args:
        anchor: Features of the student's output, one (N, C, H, W) per level; only they receive a gradient.
        negatives: Features of the K negatives, one (K · N, C, H, W) per level: the N images of negative 0 first.
        weights: One factor per level, finest level first; levels of weight 0 are skipped.
        distance: ``L1`` (mean absolute difference) or ``L2`` (mean squared difference).

    Returns:
        A scalar >= 0, in at least float32.

    Raises:
        ValueError: The numbers of levels or the shapes of a level do not match.
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
                "not match"
            )
        if weight:
            parts = theirs.detach().split(len(ours))
            each = [measure(widened(ours), widened(negative)) for negative in parts]
            total = total + weight * torch.stack(each).mean()
    return total


@LOSS_REGISTRY.register()
class NegativeLoss(nn.Module):
    """``-loss_weight · distance_to_negatives``.

    It has no lower bound: ``loss_weight`` must be small enough for the other losses to dominate.

    Args:
        loss_weight: λ (release: 0.001).
        weights: Factor per level of the extractor, finest level first (release: 0.2, 0.3, 0.5 on three levels of
            VGG16); levels after the last one that is not 0 need not be there.
        d_func: ``L1`` (release) or ``L2``.
    """

    def __init__(
        self,
        loss_weight: float = 0.001,
        weights: Sequence[float] = (0.2, 0.3, 0.5, 0.0, 0.0),
        d_func: str = "L1",
    ) -> None:
        super().__init__()
        check_choice("NegativeLoss", "d_func", d_func, DISTANCES)
        self.loss_weight = loss_weight
        self.weights = tuple(float(weight) for weight in weights)
        self.needed = levels_needed(self.weights)
        self.distance = d_func

    def forward(self, anchor: Sequence[Tensor], negatives: Sequence[Tensor]) -> Tensor:
        """Features as in ``distance_to_negatives`` -> scalar <= 0."""
        needed, weights = self.needed, self.weights
        if needed < len(weights):
            anchor, negatives, weights = anchor[:needed], negatives[:needed], weights[:needed]
        return -self.loss_weight * distance_to_negatives(anchor, negatives, weights, self.distance)
