"""Moving averages of weights: the EMA, the history model of DCKD, the negative models of MCLIR."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from kdsr.runtime.step_guard import StepGuard

# Share of the initial weights in the EMA. Measured on an EDSR for ×4 (16 channels, 4 blocks, 1,500 iterations, Set5):
# 1 % costs 0.14 dB, 2 % 0.5 dB, 5 % 2 dB, 20 % 9 dB.
WORTH_A_WARNING = 0.01


def ema_decay_at(iteration: int, decay: float, warmup: bool) -> float:
    """The share of the old average that an iteration keeps; it depends on nothing else, so a resumed run gets the same.

    With ``warmup`` it is ``min(decay, (1 + t) / (10 + t))`` after t iterations, as in TensorFlow's
    ``ExponentialMovingAverage``: the average follows closely at first.

    Args:
        iteration: From 1.
        decay: ``train.ema_decay``, 0 to 1.
        warmup: ``train.ema_warmup``.
    """
    return min(decay, (1 + iteration) / (10 + iteration)) if warmup else decay


def fitting_decay(iterations: int) -> float:
    """The highest decay, to two digits of its distance from 1, that leaves no more than ``WORTH_A_WARNING``."""
    distance = 1 - WORTH_A_WARNING ** (1 / iterations)
    digits = 1 - math.floor(math.log10(distance))
    return round(1 - math.ceil(distance * 10**digits) / 10**digits, digits)


def lag_warning(train: Mapping[str, Any], has_warmup: bool) -> str | None:
    """A warning when the EMA of a whole run still holds much of the weights that it began with.

    Args:
        train: The options ``train``.
        has_warmup: Whether the model has the option ``ema_warmup``.
    """
    decay, total = train.get("ema_decay", 0), train.get("total_iter", 0)
    if not all(isinstance(value, int | float) for value in (decay, total)):
        return None  # the check of their types reports it
    if train.get("ema_warmup") or not (0 < decay <= 1 <= total < math.inf):
        return None
    left = decay**total
    if left <= WORTH_A_WARNING * (1 + 1e-9):  # 0.1² is a little more than 0.01
        return None
    either = ", or train.ema_warmup: true" if has_warmup else ""
    return (
        f"train.ema_decay: {decay} is slow for {int(total):,d} iterations: {100 * left:.3g} % of the initial weights "
        "are still in the moving average at the end, which is what is validated and saved as params_ema; "
        f"set {fitting_decay(int(total))} or lower{either}"
    )


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


class Ema:
    """The exponential moving average of a network's weights: ``net_g_ema``, ``params_ema`` in files.

    Args:
        source: The network that it follows.
        decay: ``train.ema_decay``, above 0 and below 1.
        warmup: ``train.ema_warmup``, see ``ema_decay_at``.

    Attributes:
        net: A copy of the network with the averaged weights: eval mode, no gradients.
    """

    def __init__(self, source: nn.Module, decay: float, warmup: bool = False) -> None:
        self.source = source
        self.net = deepcopy(source).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup

    @classmethod
    def of(cls, source: nn.Module, train: Any) -> Ema | None:
        """The moving average of ``TrainOptions``; None without ``ema_decay``."""
        return cls(source, train.ema_decay, train.ema_warmup) if train.ema_decay > 0 else None

    def update(self, iteration: int, guard: StepGuard) -> None:
        """Averages the weights after an update; does nothing if the guard has skipped it."""
        if guard.made_on_host is not False:
            where = None if guard.made_on_host else guard.made
            blend_weights(self.net, self.source, ema_decay_at(iteration, self.decay, self.warmup), where)
