"""Outputs of modules by their dotted names (``body.3``), on any network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdsr.runtime.errors import OptionError
from kdsr.runtime.suggestions import nearest

_SHARE = re.compile(r"(\d{1,6})/(\d{1,6})")  # of a list of modules: 2/3


def module_names(net: nn.Module, names: Sequence[str], option: str) -> list[str]:
    """The names as ``net.named_modules()`` gives them; shares of a list (``body.1/3``) become indices.

    ``body.p/q`` is the module that ends the first p/q of the list ``body``, rounded down: of 32 modules ``body.1/3`` is
    ``body.9``, of 8 it is ``body.1``. So one option file serves networks of any depth.

    Args:
        net: The bare network.
        names: Dotted names, as in the options.
        option: The option that has them, for messages.

    Raises:
        OptionError: There is no such module; the message names those that exist.
    """
    modules = {name for name, _ in net.named_modules() if name}
    found = [name if name in modules else _without_shares(net, name) for name in names]
    unknown = [name for name, real in zip(names, found, strict=True) if real not in modules]
    if unknown:
        kind = type(net).__name__
        raise OptionError(
            [f"{option}: {kind} has no module {name!r}; {_instead(net, name, modules)}" for name in unknown]
        )
    return found


def _without_shares(net: nn.Module, name: str) -> str:
    module, parts = net, []
    for part in name.split("."):
        share, length = _SHARE.fullmatch(part), _list_length(module)
        if share and length and share_problem(part) is None:
            part = str(max(length * int(share[1]) // int(share[2]), 1) - 1)
        children = dict(module.named_children())
        if part not in children:
            return name
        module = children[part]
        parts.append(part)
    return ".".join(parts)


def _list_length(module: nn.Module) -> int:
    """The number of modules of a Sequential or ModuleList; 0 for anything else."""
    names = [name for name, _ in module.named_children()]
    return len(names) if names == [str(index) for index in range(len(names))] else 0


def _instead(net: nn.Module, name: str, modules: set[str]) -> str:
    """A suggestion for a name that does not exist."""
    parent, _, last = name.rpartition(".")
    length = _list_length(net.get_submodule(parent)) if parent in modules else 0
    if length and last.isdigit():
        there = f"{parent}.0 to {parent}.{length - 1}" if length > 1 else f"{parent}.0 alone"
        return f"there is {there}; {parent}.1/2 is the middle at any depth"
    return nearest(name, modules)


def share_problem(name: str) -> str | None:
    """What is wrong with the shares in a name for ``module_names``; None where nothing is."""
    for part in name.split("."):
        share = _SHARE.fullmatch(part)
        if share and not 1 <= int(share[1]) <= int(share[2]):
            return f"{part} is no share of a list of modules: 1/3 ends its first third, 1/1 is the last"
    return None


class FeatureTaps:
    """Keeps the outputs of named modules of a network until they are taken.

    In-place modules of the network are made out-of-place. Outputs that the network itself overwrites are copied, from
    the second pass on (``shapes_of`` makes the first). If a module is called several times in a forward pass, the last
    output is kept. Register before ``torch.compile``.

    Args:
        net: The bare network.
        names: Dotted names, see ``module_names``.
        option: The option that named them, for messages.

    Raises:
        OptionError: There is no such module; with the nearest names.
    """

    def __init__(self, net: nn.Module, names: Sequence[str], option: str) -> None:
        self.names = tuple(module_names(net, names, option))
        self.option = option
        # Its features have one batch entry per colour, which become channels.
        self.colour_wise = bool(getattr(net, "colour_wise", False))
        self._kept: dict[str, tuple[Any, int]] = {}
        self._overwritten: set[str] = set()
        modules = {name: module for name, module in net.named_modules() if name}
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
        """The features of the last forward pass, in the order of the names, (N, C, H, W) each; they are dropped here.

        Args:
            lq: The input of the network, (N, C, H, W).

        Raises:
            OptionError: A module's output is no feature map, or it was not called.
        """
        kept, self._kept = self._kept, {}
        # A network may change a module's output in place (``res += x``): it is copied from the next pass on.
        self._overwritten |= {
            name for name, (feature, version) in kept.items() if version != _version(feature)
        }
        maps = [self._as_map(name, kept.get(name, (None, 0))[0], lq) for name in self.names]
        if self.colour_wise:
            return [feature.unflatten(0, (-1, lq.shape[1])).flatten(1, 2) for feature in maps]
        return maps

    def clear(self) -> None:
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
    """Height and width of a grid of ``tokens``: the image's sides divided by a power of two; None if none fits."""
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
