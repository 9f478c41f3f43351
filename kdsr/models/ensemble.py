"""Ensemble: several teachers that are one to the rest of the package."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdsr.models.restorer import declared_multiple
from kdsr.runtime.errors import OptionError


class Ensemble(nn.ModuleList):
    """Networks whose outputs are averaged. Their modules are named after their numbers: ``0.body.3``.

    Args:
        networks: At least one.
        weights: One per network, divided by their sum here; by default all alike.
        option: The option that lists them, for messages.
    """

    def __init__(self, networks: Sequence[nn.Module], weights: Sequence[float] | None, option: str) -> None:
        super().__init__(networks)
        weights = weights or [1.0] * len(networks)
        self.weights = [weight / sum(weights) for weight in weights]
        self.option = option
        self.multiple_of = math.lcm(*map(declared_multiple, networks))

    def forward(self, lq: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H·scale, W·scale), the weighted mean.

        Raises:
            OptionError: The networks give images of different shapes.
        """
        outputs = [net(lq).to(lq.dtype) for net in self]
        for index, output in enumerate(outputs):
            if output.shape != outputs[0].shape:
                sizes = ("×".join(map(str, one.shape[1:])) for one in (output, outputs[0]))
                raise OptionError(
                    "{0}.{1}: gives images of {2}, {0}.0 of {3} (channels × height × width); they are averaged".format(
                        self.option, index, *sizes
                    )
                )
        weighted = [weight * output for weight, output in zip(self.weights, outputs, strict=True)]
        return functools.reduce(torch.add, weighted)
