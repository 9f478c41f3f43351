"""Label consistency of DCKD's release: the teacher gets an augmented view, and its output is transformed back.

``L_lcr = L1(S(x), A⁻¹ T(A x))``. A inverts colours, flips and transposes, each for a random subset of the samples. A
restoration network commutes with A only approximately, so the second view gives additional information.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdsr.runtime.declarations import Options, option
from kdsr.runtime.errors import OptionError


@dataclass(frozen=True)
class AugmentationPlan:
    """Which samples each augmentation applies to: boolean masks of shape (N,), on the CPU."""

    invert: Tensor
    hflip: Tensor
    vflip: Tensor
    transpose: Tensor


def _where(mask: Tensor, changed: Tensor, x: Tensor) -> Tensor:
    return torch.where(mask.to(x.device, non_blocking=True).view(-1, 1, 1, 1), changed, x)


def _transposed(x: Tensor, mask: Tensor) -> Tensor:
    # the masks are on the CPU, so this does not synchronise
    return _where(mask, x.transpose(2, 3), x) if mask.any() else x


def check_square(height: int, width: int) -> None:
    """Raises OptionError unless patches of this size can be transposed within a batch."""
    if height != width:
        raise OptionError(
            f"train.lcr_opt and train.zoom_in_opt transpose, which needs square patches; these are {height}x{width}; "
            "train on square crops (datasets.train.gt_size), or leave lcr_opt and zoom_in_opt out"
        )


def augment(x: Tensor, plan: AugmentationPlan) -> Tensor:
    """A x: inverts colours (1 - x), flips horizontally and vertically, and transposes, each by its mask.

    Args:
        x: (N, C, H, W) in [0, 1]; square if any sample is transposed.
        plan: Masks for the N samples.

    Raises:
        OptionError: A transposition of patches that are not square.
    """
    if plan.transpose.any():
        check_square(*x.shape[2:])
    x = _where(plan.invert, 1 - x, x)
    x = _where(plan.hflip, x.flip(3), x)
    x = _where(plan.vflip, x.flip(2), x)
    return _transposed(x, plan.transpose)


def restore(y: Tensor, plan: AugmentationPlan) -> Tensor:
    """A⁻¹ y: the inverse steps of ``augment`` in reverse order. y may have another resolution than x."""
    y = _transposed(y, plan.transpose)
    y = _where(plan.vflip, y.flip(2), y)
    y = _where(plan.hflip, y.flip(3), y)
    return _where(plan.invert, 1 - y, y)


class NoisyOptions(Options):
    prob: float = option(
        0.5, "Probability of each of the four augmentations, per sample.", lowest=0, highest=1
    )


class AugmentationOptions(Options):
    noisy: NoisyOptions = option(None, "Augmentations of the label consistency.")


class LabelConsistency:
    """Draws plans and applies them.

    Args:
        prob: Probability of each of the four augmentations, independent per sample. The release's undocumented option
            `train.noisy.prob` is interpreted as this probability; the paper states 0.5.

    Raises:
        OptionError: prob is outside [0, 1].
    """

    def __init__(self, prob: float = 0.5) -> None:
        if not 0 <= prob <= 1:
            raise OptionError(f"train.noisy.prob: {prob} is not a probability; give a number from 0 to 1")
        self.prob = prob

    def draw(self, samples: int, generator: torch.Generator) -> AugmentationPlan:
        """Draws masks for a number of samples from a CPU generator."""
        chances = torch.rand(4, samples, generator=generator, dtype=torch.float64)
        return AugmentationPlan(*(chances < self.prob))

    def apply(self, x: Tensor, plan: AugmentationPlan) -> Tensor:
        """Calls ``augment``; patches must be square even if no sample is transposed in this draw."""
        if self.prob > 0:
            check_square(*x.shape[2:])
        return augment(x, plan)

    def invert(self, y: Tensor, plan: AugmentationPlan) -> Tensor:
        """Calls ``restore``."""
        return restore(y, plan)
