"""FACD: contrast between feature maps, and the adaptive gate.

"Feature-domain Adaptive Contrastive Distillation for Efficient Single Image Super-Resolution" (arXiv
2211.15951; IEEE Access 2023). No code was released; the equations are our reading, see docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdsr.losses.levels import check_choice
from kdsr.losses.mscn import widened
from kdsr.runtime.errors import OptionError

KINDS = ("infonce", "ratio")
GATES = ("hard", "soft", "off")


class _PairwiseDistance(torch.autograd.Function):
    """Maps (N, C, H, W) and candidates (M, C, H, W) -> (N, M) mean absolute differences.

    Processes one candidate at a time, without N x M maps. (On a GPU the backward pass of ``torch.cdist`` with p = 1
    stores them all, and its float32 sums are a hundred times less accurate.)
    """

    @staticmethod
    def forward(ctx, maps: Tensor, candidates: Tensor) -> Tensor:
        ctx.save_for_backward(maps, candidates)
        return torch.stack([(maps - one).abs_().flatten(1).mean(1) for one in candidates], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        maps, candidates = ctx.saved_tensors
        out = torch.zeros_like(maps)
        for column, one in zip(grad.unbind(1), candidates, strict=True):
            out.addcmul_((maps - one).sign_(), column.view(-1, 1, 1, 1))
        return out.div_(maps[0].numel()), None


def pairwise_distance(maps: Tensor, candidates: Tensor) -> Tensor:
    """Distances d of all maps to all candidates: mean absolute difference of channel-normalised maps.

    The channel vector of each position is scaled to norm 1 (zeros stay).

    Args:
        maps: The student's adapted features (N, C, H, W); only they receive a gradient.
        candidates: The teacher's features (M, C, H, W).

    Returns:
        (N, M), in [0, 2 / sqrt(C)], in at least float32.
    """
    student, teacher = (F.normalize(widened(x), dim=1, eps=1e-6) for x in (maps, candidates.detach()))
    return _PairwiseDistance.apply(student, teacher)


def contrast(
    distances: Tensor, own: Tensor, *, kind: str = "infonce", temperature: float = 0.02, eps: float = 1e-7
) -> tuple[Tensor, Tensor]:
    """The loss of each sample from its distances to all candidates, and a bound on the mutual information.

    - ``infonce``: ``L = -log( e^(-d_pos/t) / sum over all K candidates of e^(-d/t) )``;
    - ``ratio``: ``L = d_pos / (mean of d_neg + eps)``.

    Args:
        distances: d, (N, K): sample by candidate.
        own: (N,) indices of each sample's positive. All other candidates are its negatives.
        kind: ``infonce`` or ``ratio``.
        temperature: t of ``infonce`` and of the bound.
        eps: Added to the denominator of ``ratio``.

    Returns:
        The losses (N,) and, without gradient, ``log K - L_infonce`` (N,): its mean is a lower bound on the mutual
        information of student and teacher in nats, at most log K.

    Raises:
        OptionError: There is only one candidate, thus no negative.
    """
    candidates = distances.shape[1]
    if candidates < 2:
        raise OptionError(
            "FACD contrasts a sample with the other samples of the batch, and this batch has one: set "
            "datasets.train.batch_size_per_gpu to 2 or more, or train on several GPUs"
        )
    positive = distances.gather(1, own.unsqueeze(1)).squeeze(1)
    logits = -distances / temperature
    nce = logits.logsumexp(1) + positive / temperature
    bound = math.log(candidates) - nce.detach()
    if kind == "infonce":
        return nce, bound
    negatives = (distances.sum(1) - positive) / (candidates - 1)
    return positive / (negatives + eps), bound


@torch.no_grad()
def patch_gate(
    student_out: Tensor,
    teacher_out: Tensor,
    gt: Tensor | None,
    mode: str = "hard",
    temperature: float = 0.01,
) -> Tensor:
    """Weights of training patches: distil where the teacher is closer to the ground truth than the student.

    Args:
        student_out: S(x), (N, C, H, W).
        teacher_out: T(x), the same shape.
        gt: y, the same shape; may be None if the mode is ``off``.
        mode: ``hard``: 1 where ``mean|T - y| < mean|S - y|``, else 0. ``soft``: the sigmoid of
            ``(mean|S - y| - mean|T - y|) / temperature``. ``off``: 1 everywhere.
        temperature: Width of the soft gate, in the images' units.

    Returns:
        (N,) in [0, 1], without gradient, in at least float32.

    Raises:
        OptionError: ``mode`` is unknown, or needs ground truth that is missing.
    """
    check_choice("FACD", "gate", mode, GATES)
    student_out, teacher_out = widened(student_out), widened(teacher_out)
    if mode == "off":
        return student_out.new_ones(student_out.shape[0])
    if gt is None:
        raise OptionError(f"train.gate: {mode} needs ground truth, and the training set has none; set off")
    gt = widened(gt)
    ahead = (student_out - gt).abs().flatten(1).mean(1) - (teacher_out - gt).abs().flatten(1).mean(1)
    return (ahead > 0).to(ahead.dtype) if mode == "hard" else torch.sigmoid(ahead / temperature)


@LOSS_REGISTRY.register()
class FACDLoss(nn.Module):
    """Feature contrast over taps, for option files.

    Args:
        loss_weight: Weight of the term.
        kind: ``infonce`` (the paper's first version) or ``ratio`` (d_pos and d_neg of the second).
        temperature: t of ``infonce`` and of the bound; distances are at most ``2 / sqrt(channels)``.
        eps: Added to the denominator of ``ratio``.
    """

    def __init__(
        self, loss_weight: float = 1.0, kind: str = "infonce", temperature: float = 0.02, eps: float = 1e-7
    ) -> None:
        super().__init__()
        check_choice("FACDLoss", "kind", kind, KINDS)
        for name, value in (("temperature", temperature), ("eps", eps)):
            if value <= 0:
                raise OptionError(f"FACDLoss: {name} {value} must be above 0")
        self.loss_weight = loss_weight
        self.kind = kind
        self.temperature = temperature
        self.eps = eps

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        own: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The contrast of each sample with all candidates, averaged over taps and samples.

        Args:
            student: Adapted features, one (N, C, H, W) per tap; only they receive a gradient.
            teacher: The teacher's features of all ranks' samples, one (M, C, H, W) per tap, in the same order at
                each tap.
            own: (N,) int64, indices of the N samples among the M; default: the first N.
            gate: (N,) weights of the samples (``patch_gate``); default: 1. Samples of weight 0 count in the mean.

        Returns:
            The weighted loss, and the bound on the mutual information in nats (of all samples, without gate and
            gradient), both scalars on the features' device.

        Raises:
            OptionError: There is only one candidate.
            ValueError: Numbers of taps or shapes differ.
        """
        if len(student) != len(teacher) or not student:
            raise ValueError(f"FACD: {len(student)} taps of the student and {len(teacher)} of the teacher")
        losses, bounds = [], []
        for tap, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if s.shape[1:] != t.shape[1:]:
                raise ValueError(
                    f"FACD, tap {tap}: the student's features have the shape {tuple(s.shape[1:])}, the "
                    f"teacher's {tuple(t.shape[1:])}; an adapter has to make them equal"
                )
            index = torch.arange(s.shape[0], device=s.device) if own is None else own
            loss, bound = contrast(
                pairwise_distance(s, t), index, kind=self.kind, temperature=self.temperature, eps=self.eps
            )
            losses.append(loss)
            bounds.append(bound)
        value = torch.stack(losses).mean(0)
        if gate is not None:
            value = value * gate.detach()
        return self.loss_weight * value.mean(), torch.stack(bounds).mean()
