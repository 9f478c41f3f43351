"""Networks that follow another one slowly: the EMA, the history model, a model of negatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def blend_weights(target: nn.Module, source: nn.Module, keep: float, where: Tensor | None = None) -> None:
    """``target ← keep·target + (1 − keep)·source`` for all parameters; buffers are copied.

    Multiplies first and adds then, as BasicSR's EMA does, so that a run agrees with BasicSR's to rounding.

    Args:
        target: Changed in place.
        source: A network of the same kind, finite.
        keep: Share of the old ``target``, 0 to 1.
        where: Boolean scalar on the device: false leaves the parameters alone. None: true.
    """
    targets: list[Tensor] = list(target.parameters())
    sources = [parameter.detach() for parameter in source.parameters()]
    if where is None:
        torch._foreach_mul_(targets, keep)
        torch._foreach_add_(targets, sources, alpha=1 - keep)
    else:
        torch._foreach_mul_(targets, torch.where(where, keep, 1.0))
        torch._foreach_add_(targets, torch._foreach_mul(sources, torch.where(where, 1 - keep, 0.0)))
    for ours, theirs in zip(target.buffers(), source.buffers(), strict=True):
        ours.copy_(theirs)
