"""Features by the dotted names of the modules that make them (``body.3``), on any network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdsr.runtime.errors import OptionError
from kdsr.runtime.names import nearest


class FeatureTaps:
    """Keeps the outputs of named modules of a network until they are taken.

    In-place modules of the network are switched off, and outputs that it overwrites itself are copied, from the second
    pass on (``shapes_of`` makes the first). Of a module that is called several times in a forward pass the last output
    counts. Hooks work on the module itself: register before ``torch.compile``.

    Args:
        net: The bare network.
        names: Dotted names as ``net.named_modules()`` gives them.
        option: The option that named them, for messages.

    Raises:
        OptionError: There is no such module; with the nearest names.
    """

    def __init__(self, net: nn.Module, names: Sequence[str], option: str) -> None:
        self.names = tuple(names)
        self.option = option
        # Its features have a batch entry per colour: they become channels.
        self.colour_wise = bool(getattr(net, "colour_wise", False))
        self._kept: dict[str, tuple[Any, int]] = {}
        self._overwritten: set[str] = set()
        modules = {name: module for name, module in net.named_modules() if name}
        unknown = [name for name in self.names if name not in modules]
        if unknown:
            raise OptionError(
                [
                    f"{option}: {type(net).__name__} has no module {name!r}; {nearest(name, modules)}"
                    for name in unknown
                ]
            )
        for module in modules.values():
            if getattr(module, "inplace", False):
                module.inplace = False
        for name in self.names:
            modules[name].register_forward_hook(self._keep_as(name))

    def _keep_as(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, tuple | list) and output:
                output = output[0]
            if name in self._overwritten and isinstance(output, Tensor):
                output = output.clone()
            self._kept[name] = (output, _version(output))

        return keep

    def take(self, lq: Tensor) -> list[Tensor]:
        """The features of the last forward pass, in the order of the names, (N, C, H, W) each; they are forgotten.

        Args:
            lq: What the network was given, (N, C, H, W).

        Raises:
            OptionError: A module's output is no feature map, or it was not called.
        """
        kept, self._kept = self._kept, {}
        # A network may add to a module's output in place (``res += x``): such a one is copied from the next pass on.
        self._overwritten |= {
            name for name, (feature, version) in kept.items() if version != _version(feature)
        }
        maps = [self._as_map(name, kept.get(name, (None, 0))[0], lq) for name in self.names]
        if self.colour_wise:
            return [feature.unflatten(0, (-1, lq.shape[1])).flatten(1, 2) for feature in maps]
        return maps

    def forget(self) -> None:
        """Drops the features of the last forward pass."""
        self._kept = {}

    def _as_map(self, name: str, feature: Any, lq: Tensor) -> Tensor:
        if isinstance(feature, Tensor) and feature.dim() == 4:
            return feature
        if isinstance(feature, Tensor) and feature.dim() == 3:
            size = _grid(feature.shape[1], lq.shape[-2], lq.shape[-1])
            if size is not None:  # a transformer's tokens, (N, H·W, C)
                return feature.transpose(1, 2).reshape(len(feature), -1, *size)
        what = "was not called" if feature is None else "gives no feature map"
        if isinstance(feature, Tensor):
            what = (
                f"gives {tuple(feature.shape)}, which is no feature map (N, C, H, W) nor tokens (N, H·W, C)"
            )
        raise OptionError(f"{self.option}: {name} {what}; tap another module")


def _version(feature: Any) -> int:
    return getattr(feature, "_version", 0)


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Height and width of so many tokens of an image whose sides were divided by a power of two."""
    for level in range(6):
        rows, columns = -(-height >> level), -(-width >> level)
        if (height >> level) * (width >> level) == tokens:
            return height >> level, width >> level
        if rows * columns < tokens:
            return None
    return None


@torch.no_grad()
def shapes_of(net: nn.Module, taps: FeatureTaps, lq: Tensor) -> list[torch.Size]:
    """The shapes of tapped features for a batch ``lq``; the network is left as it was."""
    training = net.training
    net.eval()
    try:
        net(lq)
        return [feature.shape for feature in taps.take(lq)]
    finally:
        net.train(training)
