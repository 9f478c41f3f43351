"""Mixup (Zhang et al., ICLR 2018, arXiv 1710.09412) of the images of a batch, as Restormer trains with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdsr.runtime.declarations import Options, option


class MixingOptions(Options):
    mixup: bool = option(False, "Whether the images of a batch are mixed, LQ and GT alike, before the step.")
    mixup_beta: float = option(1.2, "The share of an image is drawn from Beta(b, b) with this b.", above=0)
    use_identity: bool = option(False, "Whether every second batch, at random, stays as it is.")


def mixed(
    lq: Tensor, gt: Tensor | None, options: MixingOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """``s * x + (1 - s) * x[order]`` of both: one share ``s`` and one random order for the whole batch.

    Args:
        lq: (N, C, H, W).
        gt: (N, C, H·scale, W·scale), or None.
        options: ``train.mixing_augs``.
        generator: On the CPU.

    Returns:
        The same shapes.
    """
    if options.use_identity and torch.rand((), generator=generator).item() < 0.5:
        return lq, gt
    seed = int(torch.randint(2**62, (), generator=generator))  # torch's Beta takes no generator
    share = float(np.random.default_rng(seed).beta(options.mixup_beta, options.mixup_beta))
    order = torch.randperm(len(lq), generator=generator).to(lq.device)

    def mix(images: Tensor) -> Tensor:
        return share * images + (1 - share) * images[order]

    return mix(lq), None if gt is None else mix(gt)
