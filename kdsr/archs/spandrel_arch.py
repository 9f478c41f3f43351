"""Networks whose checkpoints the library spandrel recognises (https://github.com/chaiNNer-org/spandrel, MIT).

This package reads the file; spandrel only gets the weights, detects architecture and hyperparameters, and builds the
network. Its parameters and modules keep their names; only ``forward`` is wrapped to follow this package's conventions.
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

_SHOWN = 4  # names of tensors in a message
_NAMES = re.compile(r'"[^"]*"(?:, "[^"]*")+')
# architectures with a second input
_NEEDS_MORE = {"DRUNet": "the level of the noise", "FDnCNN": "the level of the noise"}


class Facts(NamedTuple):
    """Properties of a network according to spandrel."""

    architecture: str
    scale: int
    channels: int  # of input and output: 1 or 3
    multiple_of: int  # input sides must be multiples of this
    minimum: int  # smallest input side
    square: bool  # whether both sides must be equal
    not_in: frozenset[torch.dtype]  # reduced-precision dtypes that it does not support
    reloads: bool = True  # whether spandrel recognises the network's own state dict


class _Fitted(nn.Module):
    """First base of the network's class: ``super().forward`` is the architecture's."""

    facts: Facts
    spandrel_call: Callable[[Any, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) in [0, 1] -> (N, C, H·scale, W·scale)
        facts, batch = self.facts, x.shape[0]
        if facts.channels == 1:
            x = x.flatten(0, 1).unsqueeze(1)
        height, width = x.shape[-2:]
        x = _padded(x, facts).clone()  # RCAN multiplies it in place
        device = x.device.type
        plain: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) in facts.not_in:
            plain, x = torch.autocast(device, enabled=False), x.float()
        with plain:
            y = self.spandrel_call(_Own(self, super().forward), x)
        y = y[..., : height * facts.scale, : width * facts.scale]
        return y.reshape(batch, -1, *y.shape[-2:]) if facts.channels == 1 else y


class _Own:
    """The network with the architecture's own ``forward``, for spandrel's call function."""

    def __init__(self, net: nn.Module, forward: Callable[..., Any]) -> None:
        self._net, self.forward = net, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)


def _padded(x: Tensor, facts: Facts) -> Tensor:
    """Pads at the bottom and right to a supported size; as in spandrel, by reflection as far as possible."""
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


def fitted(net: Any, facts: Facts, call: Callable[[Any, Tensor], Tensor], notes: tuple[str, ...]) -> Any:
    """Makes an architecture's network one of this package's; ``call`` is spandrel's way to call it."""
    net.__class__ = type(type(net).__name__, (_Fitted, type(net)), {})
    net.facts, net.spandrel_call, net.notes = facts, call, notes
    net.multiple_of, net.colour_wise, net.not_in = facts.multiple_of, facts.channels == 1, facts.not_in
    return net


@ARCH_REGISTRY.register()
class Spandrel:
    """Builds the network of a checkpoint that spandrel recognises, with its weights.

    - The result is an instance of the architecture's class; a student's saved file can be read by spandrel again.
    - Input: (N, C, H, W), RGB, [0, 1], with sides that are multiples of ``multiple_of``; images that are too small or
      not square are padded and cropped inside. Output: (N, C, H·scale, W·scale), not clamped.
    - A grey network processes the colours separately, as one batch (``colour_wise``).
    - If spandrel marks half precision or bfloat16 as unsupported, the network runs in float32 under autocast.

    Args:
        path: A file for ``read_checkpoint``; in BasicSR's files ``params_ema`` is preferred to ``params``.

    Raises:
        CheckpointError: The file is unreadable, of an unknown architecture, or of one whose inputs or outputs are not
            images.
    """

    BRINGS_WEIGHTS = True  # needs no other checkpoint

    def __new__(cls, path: str) -> Any:  # an nn.Module
        descriptor, facts = _load(os.path.expanduser(path))
        return fitted(descriptor.model, facts, descriptor._call_fn, _notes(facts, path))

    @classmethod
    def facts(cls, options: Mapping[str, Any]) -> Facts:
        """The properties of the network with these options; raises ``CheckpointError`` like the class."""
        path = os.path.expanduser(options["path"])
        try:
            stat = os.stat(path)
        except (OSError, ValueError):
            return _load(path)[1]  # raises
        return _facts(path, stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """Problems with the file; empty if the network can be built."""
        if "path" not in options:
            return []  # reported by the signature check
        if not isinstance(options["path"], str):
            return [f"path: expected the name of a file, got {options['path']!r}"]
        try:
            cls.facts(options)
        except CheckpointError as error:
            return [f"path: {problem}" for problem in error.problems]
        return []


@functools.lru_cache(maxsize=8)
def _facts(path: str, *_version: int) -> Facts:
    return _load(path)[1]


def _load(path: str) -> tuple[Any, Facts]:
    """spandrel's descriptor, which holds the network, and its properties."""
    import spandrel  # takes a second

    found = read_checkpoint(path)
    try:
        weights = spandrel.canonicalize_state_dict(dict(found))
    except AttributeError:  # a key that is not a string
        weights = {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f"{path}: holds no weights under a key that spandrel knows (params_ema, params, state_dict, …) or at the "
            f"top level; its first keys are {_listed(found)}"
        )
    # may remove the prefix of spandrel's netG.
    weights = spandrel.canonicalize_state_dict(unwrapped_weights(weights))
    architecture = spandrel_architecture(weights)
    if architecture is None:
        _refuse_known_type(path, weights)
        known = {entry.architecture.name for entry in spandrel.MAIN_REGISTRY}
        raise CheckpointError(
            f"{path}: not of an architecture that spandrel {spandrel.__version__} knows. It holds {len(weights)} "
            f"tensors: {_listed(weights)}. spandrel knows {', '.join(sorted(known, key=str.lower))}"
        )
    names = set(weights)
    try:
        with torch.device("cpu"):  # not meta: detection computes with values of the weights
            descriptor = architecture.load(weights)
    except KdsrError:
        raise
    except Exception as error:  # from an architecture with unexpected weights
        _refuse_known_type(path, weights)
        # torch lists the missing tensors in the second line
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        reason = _NAMES.sub(lambda names: listing(names[0].split(", "), _SHOWN), reason)
        raise CheckpointError(
            f"{path}: looks like {architecture.name}, but spandrel cannot build it ({type(error).__name__}: {reason})"
        ) from error
    refused = refusal(descriptor, isinstance(descriptor, spandrel.ImageModelDescriptor))
    if refused:
        raise CheckpointError(f"{path}: is a {architecture.name} network, which {refused}")
    facts = facts_of(descriptor)
    own = descriptor.model.state_dict()
    if own.keys() != names:  # renamed by spandrel
        facts = facts._replace(reloads=_reloads(own, facts))
    return descriptor, facts


def _refuse_known_type(path: str, weights: Mapping[str, Any]) -> None:
    """Raises a ``CheckpointError`` for weights of a network in BasicSR or this package."""
    if kind := known_type(weights.keys()):
        raise CheckpointError(
            f"{path}: spandrel does not know {kind}; use `type: {kind}` with its options, and name this file in "
            "path.pretrain_network_t (teacher) or path.pretrain_network_g (student)"
        )


def facts_of(descriptor: Any) -> Facts:
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


def _reloads(own: Mapping[str, Tensor], facts: Facts) -> bool:
    try:
        with torch.device("cpu"):
            return facts_of(spandrel_architecture(own).load(dict(own))) == facts
    except Exception:  # also AttributeError of None, if not recognised
        return False


def refusal(descriptor: Any, of_images: bool) -> str | None:
    """Why a network cannot be run on images only, or None."""
    if not of_images:
        return "needs a mask as second input, which data sets do not have"
    for name in (descriptor.architecture.id, *descriptor.tags):
        if name in _NEEDS_MORE:
            return f"needs {_NEEDS_MORE[name]} as second input, which data sets do not have"
    taken, given = descriptor.input_channels, descriptor.output_channels
    if taken != given or taken not in (1, 3):
        return f"has {taken} input and {given} output channels; both must be 3 (RGB) or 1 (grey)"
    return None


def _notes(facts: Facts, path: str) -> tuple[str, ...]:
    summary = f"{facts.architecture}, scale {facts.scale}, read by spandrel from {path}"
    more = {
        "it is for grey images: colours are processed separately, as one batch": facts.channels == 1,
        "spandrel has renamed its weights and does not recognise the new names: to test a student, give this file as "
        "its path and the trained weights as path.pretrain_network_g": not facts.reloads,
    }
    return (summary, *(note for note, holds in more.items() if holds))


def _listed(tensors: Mapping[str, Any]) -> str:
    shown = [
        f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else str(name)
        for name, value in list(tensors.items())[:_SHOWN]
    ]
    return ", ".join(shown) + (", ..." if len(tensors) > _SHOWN else "")
