"""Any network whose checkpoint the library spandrel recognises (https://github.com/chaiNNer-org/spandrel, MIT).

The file is read by this package, never unpickled by spandrel, which gets the bare weights, finds out the architecture
and its hyperparameters and builds the network. That stays what it is, names of parameters and modules included; only
a ``forward`` is put before its own, which keeps to the rules of this package's networks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from kdsr.runtime.checkpoint import read_checkpoint, unwrapped_weights
from kdsr.runtime.errors import CheckpointError, KdsrError
from kdsr.runtime.recognition import known_type, spandrel_architecture
from kdsr.runtime.torch_files import listing

_SHOWN = 4  # names of tensors that a message lists
_NAMES = re.compile(r'"[^"]*"(?:, "[^"]*")+')
# what an architecture takes beside the image
_NEEDS_MORE = {"DRUNet": "the level of the noise", "FDnCNN": "the level of the noise"}


class Facts(NamedTuple):
    """What spandrel says of a network.

    Attributes:
        architecture: Its name.
        scale: Output pixels per input pixel, along a side.
        channels: Of input and output, 1 or 3 each.
        multiple_of: Sides of the input are multiples of it.
        minimum: Shortest side that it takes.
        square: Whether both sides must be equal.
        not_in: Types of reduced precision in which it does not work.
        returns: Whether spandrel makes the same network of its weights under the names that they have in it.
    """

    architecture: str
    scale: int
    channels: int
    multiple_of: int
    minimum: int
    square: bool
    not_in: frozenset[torch.dtype]
    returns: bool = True


class _Fitted(nn.Module):
    """Put before the class of an architecture: ``super().forward`` is the architecture's own."""

    facts: Facts
    spandrel_call: Callable[[Any, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) in [0, 1] -> (N, C, H·scale, W·scale)
        facts, batch = self.facts, len(x)
        if facts.channels == 1:
            x = x.flatten(0, 1).unsqueeze(1)
        height, width = x.shape[-2:]
        x = _extended(x, facts).clone()  # RCAN multiplies it in place
        device = x.device.type
        plain: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) in facts.not_in:
            plain, x = torch.autocast(device, enabled=False), x.float()
        with plain:
            y = self.spandrel_call(_Own(self, super().forward), x)
        y = y[..., : height * facts.scale, : width * facts.scale]
        return y.reshape(batch, -1, *y.shape[-2:]) if facts.channels == 1 else y


class _Own:
    """A fitted network as its architecture made it: what spandrel's way to call it is given."""

    def __init__(self, net: nn.Module, forward: Callable[..., Any]) -> None:
        self._net, self.forward = net, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)


def _extended(x: Tensor, facts: Facts) -> Tensor:
    """``x`` enlarged at the bottom and the right to a size that is taken; as spandrel does it, by reflection first."""
    height, width = (
        -(-max(side, facts.minimum) // facts.multiple_of) * facts.multiple_of for side in x.shape[-2:]
    )
    if facts.square:
        height = width = max(height, width)
    for mode in ("reflect", "replicate"):
        down, right = height - x.shape[-2], width - x.shape[-1]
        if mode == "reflect":  # at most side - 1
            down, right = min(down, x.shape[-2] - 1), min(right, x.shape[-1] - 1)
        if down or right:
            x = F.pad(x, (0, right, 0, down), mode)
    return x


@ARCH_REGISTRY.register()
class Spandrel:
    """The network of a checkpoint that spandrel recognises: its architecture, its hyperparameters and its weights.

    Calling it gives the architecture's own class, with the names of its own parameters; a student of this type is
    saved under them, and spandrel reads the file again. It takes (N, C, H, W), RGB, [0, 1], and gives
    (N, C, H·scale, W·scale), not clamped. Colours go through a network of grey images one by one, as one batch
    (``colour_wise``). Sides must be multiples of ``multiple_of``; a smaller image than it takes, or one that is not
    square, is extended and cropped inside.

    Where spandrel says that an architecture does not work in half precision or bfloat16, it is computed in float32
    under autocast.

    Args:
        path: Anything that ``read_checkpoint`` reads; of BasicSR's files ``params_ema`` counts before ``params``.

    Raises:
        CheckpointError: The file cannot be read, is of no architecture that spandrel knows, or of one that takes or
            gives something else than an image.
    """

    BRINGS_WEIGHTS = True  # a checkpoint may be given beside it, and need not be

    def __new__(cls, path: str) -> Any:  # an nn.Module
        descriptor, facts = _load(os.path.expanduser(path))
        net = descriptor.model
        net.__class__ = type(type(net).__name__, (_Fitted, type(net)), {})
        net.facts, net.spandrel_call = facts, descriptor._call_fn
        net.multiple_of, net.colour_wise = facts.multiple_of, facts.channels == 1
        net.not_in, net.notes = facts.not_in, _notes(facts, path)
        return net

    @classmethod
    def facts(cls, options: Mapping[str, Any]) -> Facts:
        """What spandrel says of the network of these options.

        Raises:
            CheckpointError: As for the class.
        """
        path = os.path.expanduser(options["path"])
        try:
            stat = os.stat(path)
        except (OSError, ValueError):
            return _load(path)[1]  # says why
        return _facts(path, stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """What is wrong with the file; empty when the network can be built."""
        if "path" not in options:
            return []  # which others say
        if not isinstance(options["path"], str):
            return [f"path: expected the name of a file, got {options['path']!r}"]
        try:
            cls.facts(options)
        except CheckpointError as error:
            return [f"path: {problem}" for problem in error.problems]
        return []


@functools.lru_cache(maxsize=8)
def _facts(path: str, *which: int) -> Facts:
    return _load(path)[1]


def _load(path: str) -> tuple[Any, Facts]:
    """spandrel's descriptor, which holds the network, and what it says."""
    import spandrel  # takes a second, and few need it

    found = read_checkpoint(path)
    try:
        weights = spandrel.canonicalize_state_dict(dict(found))
    except AttributeError:  # a key that is no text
        weights = {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f"{path}: holds no weights where spandrel looks for them (params_ema, params, state_dict and the like, or "
            f"the file itself); its keys begin with {_listed(found)}"
        )
    weights = spandrel.canonicalize_state_dict(unwrapped_weights(weights))  # which may uncover its netG.
    architecture = spandrel_architecture(weights)
    if architecture is None:
        _refuse_known_type(path, weights)
        known = {entry.architecture.name for entry in spandrel.MAIN_REGISTRY}
        raise CheckpointError(
            f"{path}: is of no architecture that spandrel {spandrel.__version__} knows. It holds {len(weights)} "
            f"tensors: {_listed(weights)}. spandrel knows {', '.join(sorted(known, key=str.lower))}"
        )
    names = set(weights)
    try:
        with torch.device("cpu"):  # whatever its surroundings say, for it computes with values of the weights
            descriptor = architecture.load(weights)
    except KdsrError:
        raise
    except Exception as error:  # whatever an architecture makes of weights that it does not expect
        _refuse_known_type(path, weights)
        # torch names the tensors in the second line, all of those that are missing
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        reason = _NAMES.sub(lambda names: listing(names[0].split(", "), _SHOWN), reason)
        raise CheckpointError(
            f"{path}: looks like {architecture.name}, but spandrel cannot build it ({type(error).__name__}: {reason})"
        ) from error
    refused = _refusal(descriptor, isinstance(descriptor, spandrel.ImageModelDescriptor))
    if refused:
        raise CheckpointError(f"{path}: is a {architecture.name} network, which {refused}")
    facts = _said_of(descriptor)
    own = descriptor.model.state_dict()
    if own.keys() != names:  # spandrel has renamed them
        facts = facts._replace(returns=_returns(own, facts))
    return descriptor, facts


def _refuse_known_type(path: str, weights: Mapping[str, Any]) -> None:
    """Raises a CheckpointError for weights of a network that BasicSR or this package has."""
    if kind := known_type(weights.keys()):
        raise CheckpointError(
            f"{path}: spandrel does not know {kind}; use `type: {kind}` with its sizes, and name this file in "
            "path.pretrain_network_t (teacher) or path.pretrain_network_g (student)"
        )


def _said_of(descriptor: Any) -> Facts:
    wanted = descriptor.size_requirements
    precisions = {torch.float16: descriptor.supports_half, torch.bfloat16: descriptor.supports_bfloat16}
    return Facts(
        architecture=descriptor.architecture.name,
        scale=descriptor.scale,
        channels=descriptor.input_channels,
        multiple_of=max(1, wanted.multiple_of),
        minimum=wanted.minimum,
        square=wanted.square,
        not_in=frozenset(dtype for dtype, works in precisions.items() if not works),
    )


def _returns(own: Mapping[str, Tensor], facts: Facts) -> bool:
    try:
        with torch.device("cpu"):
            return _said_of(spandrel_architecture(own).load(dict(own))) == facts
    except Exception:  # None too, where it is not recognised
        return False


def _refusal(descriptor: Any, of_images: bool) -> str | None:
    """Why a network cannot be run on images alone; None where it can."""
    if not of_images:
        return "needs a mask beside the image; a data set has none"
    more = next(
        (_NEEDS_MORE[name] for name in (descriptor.architecture.id, *descriptor.tags) if name in _NEEDS_MORE),
        None,
    )
    if more:
        return f"needs {more} beside the image; a data set does not say it"
    taken, given = descriptor.input_channels, descriptor.output_channels
    if taken != given or taken not in (1, 3):
        return f"takes {taken} channels and gives {given}; it must be 3 and 3 (RGB), or 1 and 1 (grey)"
    return None


def _notes(facts: Facts, path: str) -> tuple[str, ...]:
    said = f"{facts.architecture}, scale {facts.scale}, as spandrel reads it from {path}"
    more = {
        "it takes grey images: the colours go through it one by one, as one batch": facts.channels == 1,
        "spandrel has renamed its weights, and does not recognise them as they are now: to test a student, give the "
        "file of this one as its path and the trained weights as path.pretrain_network_g": not facts.returns,
    }
    return (said, *(note for note, holds in more.items() if holds))


def _listed(tensors: Mapping[str, Any]) -> str:
    shown = [
        f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else str(name)
        for name, value in list(tensors.items())[:_SHOWN]
    ]
    return ", ".join(shown) + (", ..." if len(tensors) > _SHOWN else "")
