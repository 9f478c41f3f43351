"""Contrastive ratio of DCKD's dynamic contrastive regularisation (arXiv 2412.08939).

The student's output (anchor) is pulled towards the teacher's (positive) and pushed away from outputs of the
history model (negatives), all of them seen through the levels of a frozen encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdsr.runtime.errors import OptionError

DISTANCES = ("L1", "L2")
RATIOS = ("batch", "image")


class _SummedDistance(torch.autograd.Function):
    """Sum over K references of the mean distance to the anchor, per image.

    Anchor (N, C, H, W), references (K, N, C, H, W) -> (N,).

    Left to autograd, each of the K references keeps a difference of the anchor's full size (level 1 of one
    192x192 image has 19 MB) until the backward pass. The derivative with respect to the anchor is known in
    the forward pass, so one map is kept instead of K, and no gradient is made for references, which are
    frozen.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, references: Tensor, distance: str) -> Tensor:
        wide = torch.promote_types(anchor.dtype, torch.float32)  # sums of bf16 maps are taken in float32
        slope = torch.zeros_like(anchor)
        total = anchor.new_zeros(anchor.shape[0], dtype=wide)
        for reference in references:
            difference = anchor - reference
            # (not vector_norm: on the CPU its float32 sum over a whole level is off by 1e-3)
            if distance == "L1":
                total += difference.abs().flatten(1).sum(1, dtype=wide)
                slope += difference.sign_()
            else:
                total += difference.square().flatten(1).sum(1, dtype=wide)
                slope.add_(difference, alpha=2)
        ctx.save_for_backward(slope)
        return total / anchor[0].numel()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        scale = (grad / slope[0].numel()).to(slope.dtype)
        return slope * scale.view(-1, *[1] * (slope.dim() - 1)), None, None


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

    Only the anchor receives a gradient; positive and negatives count as constants.

    Args:
        anchor: Features of the student's output, one (N, C, H, W) per level.
        positive: Features of the teacher's output, same shapes.
        negatives: Features of the K negatives, one (K * N, C, H, W) or (K, N, C, H, W) per level. The N
            images of negative 0 come first, then those of negative 1, as ``torch.cat([neg_0, neg_1, ...])``
            orders them.
        weights: One factor per level, finest level first (the paper: 1/32, 1/16, 1/8, 1/4, 1).
        distance: ``L1`` (stated: mean absolute difference) or ``L2`` (mean squared difference).
        ratio: Over what the two distances are averaged before they are divided. ``batch``: the whole batch,
            as the authors' release does. ``image``: each image by itself, the ratios then averaged (our
            reading of the paper, whose equation is written for one image). With one image they are the same.
        eps: Added to the denominator (the release's value).

    Returns:
        A scalar >= 0, in float32 when the features are narrower.

    Raises:
        ValueError: The numbers of levels differ, or a level's shapes do not fit together.
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
                f"and negatives {tuple(n.shape)} do not fit"
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
    """``contrastive_ratio`` as a loss of option files (`train.cl_opt` of DCKD's release).

    Args:
        loss_weight: Factor of the whole term (the paper: 0.1).
        d_func: Distance, ``L1`` or ``L2``.
        weights: Factor per level, finest level first.
        reduction: ``mean``, the only one: a ratio of means is a scalar already.
        ratio: ``batch`` (the release) or ``image``, see ``contrastive_ratio``.

    Raises:
        OptionError: A value is none of those.
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
        for name, value, known in (
            ("d_func", d_func, DISTANCES),
            ("reduction", reduction, ("mean",)),
            ("ratio", ratio, RATIOS),
        ):
            if value not in known:
                raise OptionError(f"ContrasLoss: {name} {value!r} is unknown; it can be {' or '.join(known)}")
        self.loss_weight = loss_weight
        self.weights = tuple(float(weight) for weight in weights)
        self.distance = d_func
        self.ratio = ratio

    def forward(
        self, anchor: Sequence[Tensor], positive: Sequence[Tensor], negatives: Sequence[Tensor]
    ) -> Tensor:
        """Features as in ``contrastive_ratio`` -> scalar."""
        value = contrastive_ratio(
            anchor, positive, negatives, self.weights, distance=self.distance, ratio=self.ratio
        )
        return self.loss_weight * value
