"""Cross-entropy between the code distributions of teacher and student (DCKD's distribution mapping module).

A frozen VQGAN compares each token of an image with every entry of its codebook (arXiv 2412.08939, Eq. 8 and
9). How near each entry is becomes a categorical distribution; the student's shall be the teacher's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.runtime.errors import OptionError

VARIANTS = ("released", "equation_9")
REDUCTIONS = ("mean", "sum")


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def code_distribution(code_logits: Tensor) -> Tensor:
    """C = softmax(-||F - e||^2): how likely each of M codes is for each token.

    The paper's Eq. 8 prints no minus sign. The authors' release has it; without it the farthest code wins.

    Args:
        code_logits: (tokens, M), the negative squared distances.

    Returns:
        (tokens, M), each row sums to 1; float32 when the logits are narrower.
    """
    return _widened(code_logits).softmax(1)


def distribution_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, variant: str = "equation_9", reduction: str = "mean"
) -> Tensor:
    """-sum_m C_m^T log C_m^S, over tokens. Only the student receives a gradient.

    Args:
        student_logits: (tokens, M), negative squared distances to the codes for the student's output.
        teacher_logits: The same for the teacher's output.
        variant: ``equation_9`` is the paper's Eq. 9. ``released`` is what the authors' release computes: it
            hands probabilities to a function that expects logits, so that softmax is applied twice to the
            student. For 1024 codes that value lies between 5.93 and 6.93 whatever the images are, and carries
            almost no signal.
        reduction: ``mean`` or ``sum`` over tokens.

    Returns:
        A scalar in nats, at least the teacher's entropy (0 at best) with ``equation_9``.
    """
    target = code_distribution(teacher_logits.detach())
    logits = _widened(student_logits) if variant == "equation_9" else code_distribution(student_logits)
    return F.cross_entropy(logits, target, reduction=reduction)


@LOSS_REGISTRY.register()
class CELoss(nn.Module):
    """``distribution_cross_entropy`` as a loss of option files (`train.ce_opt` of DCKD's release).

    Args:
        loss_weight: Factor of the term (the paper: 0.001).
        reduction: ``mean`` or ``sum`` over tokens.
        variant: ``released`` by default, so that the release's option files, which have no such key, compute
            what they computed there; the templates of this project say ``equation_9``.

    Raises:
        OptionError: A value is none of those.
    """

    def __init__(self, loss_weight: float = 1.0, reduction: str = "mean", variant: str = "released") -> None:
        super().__init__()
        for name, value, known in (("reduction", reduction, REDUCTIONS), ("variant", variant, VARIANTS)):
            if value not in known:
                raise OptionError(f"CELoss: {name} {value!r} is unknown; it can be {' or '.join(known)}")
        self.loss_weight = loss_weight
        self.reduction = reduction
        self.variant = variant

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Code logits, (tokens, M) each -> scalar."""
        value = distribution_cross_entropy(
            student_logits, teacher_logits, variant=self.variant, reduction=self.reduction
        )
        return self.loss_weight * value
