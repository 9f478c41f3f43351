"""Cross-entropy between the code distributions of teacher and student (DCKD's distribution mapping module).

A frozen VQGAN compares each token of an image with every codebook entry (arXiv 2412.08939, Eq. 8 and 9). The distances
give a categorical distribution over the codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.losses.levels import check_choice

VARIANTS = ("released", "equation_9")
REDUCTIONS = ("mean", "sum")


def code_distribution(code_logits: Tensor) -> Tensor:
    """C = softmax(-||F - e||^2): probabilities of M codes for each token.

    The paper's Eq. 8 has no minus sign, the authors' release has it; without it the farthest code would be likeliest.

    Args:
        code_logits: (tokens, M), the negative squared distances.

    Returns:
        (tokens, M), rows sum to 1; in at least float32.
    """
    return code_logits.softmax(1, dtype=torch.promote_types(code_logits.dtype, torch.float32))


def distribution_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, variant: str = "equation_9", reduction: str = "mean"
) -> Tensor:
    """-sum_m C_m^T log C_m^S over tokens. Only the student receives a gradient.

    Args:
        student_logits: (tokens, M), negative squared distances to the codes for the student's output.
        teacher_logits: The same for the teacher's output.
        variant: ``equation_9``: the paper's Eq. 9. ``released``: the authors' release, which applies softmax twice to
            the student. With 1024 codes its value is between 5.93 and 6.93 for all images, with almost no signal.
        reduction: ``mean`` or ``sum`` over tokens.

    Returns:
        A scalar in nats, at least the teacher's entropy (0 at best) with ``equation_9``.
    """
    target = code_distribution(teacher_logits.detach())
    logits = student_logits.to(target.dtype) if variant == "equation_9" else code_distribution(student_logits)
    return F.cross_entropy(logits, target, reduction=reduction)


@LOSS_REGISTRY.register()
class CELoss(nn.Module):
    """``distribution_cross_entropy`` for option files (`train.ce_opt` of DCKD's release).

    Args:
        loss_weight: Weight of the term (paper: 0.001).
        reduction: ``mean`` or ``sum`` over tokens.
        variant: ``released`` by default, for the release's option files, which lack this key; this project's templates
            set ``equation_9``.
    """

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean", variant: str = "released") -> None:
        super().__init__()
        check_choice("CELoss", "reduction", reduction, REDUCTIONS)
        check_choice("CELoss", "variant", variant, VARIANTS)
        self.loss_weight = loss_weight
        self.reduction = reduction
        self.variant = variant

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Code logits, (tokens, M) each -> scalar."""
        value = distribution_cross_entropy(
            student_logits, teacher_logits, variant=self.variant, reduction=self.reduction
        )
        return self.loss_weight * value
