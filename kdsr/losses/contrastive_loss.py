"""Contrastive ratio of DCKD's dynamic contrastive regularisation (arXiv 2412.08939).

The student's output (anchor) is pulled towards the teacher's (positive) and pushed away from outputs of the history
model (negatives), in the features of a frozen encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdsr.losses.levels import check_choice, levels_needed

DISTANCES = ("L1", "L2")
RATIOS = ("batch", "image")


class _SummedDistance(torch.autograd.Function):
    """Sum over K references of the mean distance to the anchor, per image.

    Anchor (N, C, H, W), references (K, N, C, H, W) -> (N,).

    Autograd would save a difference of the anchor's size (19 MB for level 1 of one 192x192 image) for each of the K
    references. The gradient of the anchor is known in the forward pass, so one map is saved instead of K.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, references: Tensor, distance: str) -> Tensor:
        wide = torch.promote_types(anchor.dtype, torch.float32)  # bf16 maps are summed in float32
        gradient = torch.zeros_like(anchor)
        total = anchor.new_zeros(anchor.shape[0], dtype=wide)
        for reference in references:
            difference = anchor - reference
            # not vector_norm: its float32 sum over a whole level has an error of 1e-3 on the CPU
            if distance == "L1":
                total += difference.abs().flatten(1).sum(1, dtype=wide)
                gradient += difference.sign_()
            else:
                total += difference.square().flatten(1).sum(1, dtype=wide)
                gradient.add_(difference, alpha=2)
        ctx.save_for_backward(gradient)
        return total / anchor[0].numel()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = (grad / gradient[0].numel()).to(gradient.dtype)
        return gradient * scale.view(-1, *[1] * (gradient.dim() - 1)), None, None


def contrastive_ratio(
    anchor: Sequence[Tensor],
    positive: Sequence[Tensor],
    negatives: Sequence[Tensor],
    weights: Sequence[float],
    *,
    distance: str = "L1",
    ratio: str = "batch",
    eps: float = 1e-7,
) -> Tensor:
    """Weighted sum over levels of d(anchor, positive) / (sum_j d(anchor, negative_j) + eps).

    Only the anchor receives a gradient.

    Args:
        anchor: Features of the student's output, one (N, C, H, W) per level.
        positive: Features of the teacher's output, same shapes.
        negatives: Features of the K negatives, one (K * N, C, H, W) or (K, N, C, H, W) per level, in the order of
            ``torch.cat([neg_0, neg_1, ...])``.
        weights: One factor per level, finest level first (paper: 1/32, 1/16, 1/8, 1/4, 1).
        distance: ``L1`` (mean absolute difference) or ``L2`` (mean squared difference).
        ratio: ``batch``: the ratio of distances averaged over the batch (the authors' release). ``image``: the mean
            of the ratios of each image (our reading of the paper, whose equation is for one image).
        eps: Added to the denominator (default: the release's value).

    Returns:
        A scalar >= 0, in at least float32.

    Raises:
        ValueError: The numbers of levels or the shapes of a level do not match.
    """
    if not len(anchor) == len(positive) == len(negatives) == len(weights):
        raise ValueError(
            f"contrastive ratio: {len(anchor)} levels of the anchor, {len(positive)} of the positive and "
            f"{len(negatives)} of the negatives, but {len(weights)} weights (option `weights`, one per level)"
        )
    terms = []
    for level, (a, p, n, weight) in enumerate(zip(anchor, positive, negatives, weights, strict=True)):
        if p.shape != a.shape or n.shape[-3:] != a.shape[-3:] or n.numel() == 0 or n.numel() % a.numel():
            raise ValueError(
                f"contrastive ratio, level {level}: anchor {tuple(a.shape)}, positive {tuple(p.shape)} "
                f"and negatives {tuple(n.shape)} do not match"
            )
        to_positive = _SummedDistance.apply(a, p.detach().unsqueeze(0), distance)
        to_negatives = _SummedDistance.apply(a, n.detach().reshape(-1, *a.shape), distance)
        if ratio == "batch":
            term = to_positive.mean() / (to_negatives.mean() + eps)
        else:
            term = (to_positive / (to_negatives + eps)).mean()
        terms.append(weight * term)
    return torch.stack(terms).sum()


@LOSS_REGISTRY.register()
class ContrasLoss(nn.Module):
    """``contrastive_ratio`` for option files (`train.cl_opt` of DCKD's release).

    Args:
        loss_weight: Weight of the term (paper: 0.1).
        d_func: Distance, ``L1`` or ``L2``.
        weights: Factor per level, finest level first; levels after the last one above 0 need not be there.
        reduction: Only ``mean``.
        ratio: ``batch`` (the release) or ``image``, see ``contrastive_ratio``.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        d_func: str = "L1",
        weights: Sequence[float] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0),
        reduction: str = "mean",
        ratio: str = "batch",
    ) -> None:
        super().__init__()
        check_choice("ContrasLoss", "d_func", d_func, DISTANCES)
        check_choice("ContrasLoss", "reduction", reduction, ("mean",))
        check_choice("ContrasLoss", "ratio", ratio, RATIOS)
        self.loss_weight = loss_weight
        self.weights = tuple(float(weight) for weight in weights)
        self.needed = levels_needed(self.weights)
        self.distance = d_func
        self.ratio = ratio

    def forward(
        self, anchor: Sequence[Tensor], positive: Sequence[Tensor], negatives: Sequence[Tensor]
    ) -> Tensor:
        """Features as in ``contrastive_ratio`` -> scalar."""
        levels = anchor, positive, negatives, self.weights
        if (needed := self.needed) < len(self.weights):
            levels = anchor[:needed], positive[:needed], negatives[:needed], self.weights[:needed]
        value = contrastive_ratio(*levels, distance=self.distance, ratio=self.ratio)
        return self.loss_weight * value
