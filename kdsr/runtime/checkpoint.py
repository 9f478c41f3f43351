"""Reads and writes checkpoints: tensors and plain values only, with errors that name what is wrong."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.errors import CheckpointError
from kdsr.runtime.recognition import architecture_name
from kdsr.runtime.safetensors_files import FlatWeights, is_safetensors, read_safetensors, save_safetensors
from kdsr.runtime.torch_files import SHOWN, listing, read_torch_file

__all__ = [
    "load_weights",
    "mismatch",
    "read_checkpoint",
    "save_file",
    "save_safetensors",
    "select_weights",
    "unwrapped_weights",
]

_FEW = 3  # names that the message about a file of another architecture lists
_DEEPEST = 32  # wrappers around one another
_COMPILED = re.compile(r"(?:^|(?<=\.))_orig_mod\.(?=.)")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a file of ``torch.save``, or a ``.safetensors``, to the CPU: tensors and plain values only.

    Nothing that a file has pickled is ever run.

    Args:
        path: BasicSR ``.pth`` or ``.state``, a bare state dict, a Lightning ``.ckpt``, or a ``.safetensors``.

    Returns:
        The dict in the file, as plain dicts, lists and tuples; pickled Lightning objects are empty stubs in it,
        numpy's numbers are Python's, and its arrays are read-only.
        Of a ``.safetensors`` the state dict, as ``FlatWeights``.

    Raises:
        CheckpointError: Missing, unreadable (truncated, damaged, no checkpoint), no dict, or a file that pickles
            anything but tensors, plain values, numpy's numbers and Lightning's own bookkeeping; those names are
            listed.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file{' (it is a folder)' if path.is_dir() else ''}")
        flat = is_safetensors(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        raise CheckpointError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    return read_safetensors(path) if flat else read_torch_file(path)


def select_weights(
    checkpoint: Mapping[str, Any],
    param_key: str | None,
    path: str | Path,
    option: str,
    own: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the names of wrappers (``unwrapped_weights``).

    Args:
        checkpoint: What ``read_checkpoint`` gave.
        param_key: Key of the weights; None: the checkpoint is the state dict itself; ``auto``: the first
            there is of ``params_ema``, ``params``, ``state_dict``, else the checkpoint itself. ``params_ema``
            falls back to ``params`` with a warning (the DCKD release's options rely on that). A
            ``.safetensors`` is the state dict itself whichever of these keys is given.
        path: The file, for messages.
        option: The option that named the file (``path.pretrain_network_t``), for messages.
        own: Names of the network's own tensors.

    Raises:
        CheckpointError: The key is absent, or what it names is no dict of tensors.
    """
    key_option = option.replace("pretrain_network_", "param_key_")
    if isinstance(checkpoint, FlatWeights):
        param_key = _no_key(checkpoint, param_key, path, key_option)
    if param_key == "auto":
        param_key = next((key for key in ("params_ema", "params", "state_dict") if key in checkpoint), None)
    if param_key == "params_ema" and param_key not in checkpoint and "params" in checkpoint:
        get_root_logger().warning(f"{path}: no params_ema in it, its params are loaded ({key_option})")
        param_key = "params"
    if param_key is not None and param_key not in checkpoint:
        bare = bool(checkpoint) and all(isinstance(value, Tensor) for value in checkpoint.values())
        keys = f"keys there are: {listing(list(checkpoint))}"
        there = "it is a bare state dict, set it to null" if bare else keys
        raise CheckpointError(f"{path}: {key_option} is {param_key}, which is not in it; {there}")
    weights = checkpoint if param_key is None else checkpoint[param_key]
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(f"{path}: what {key_option} ({param_key}) names is no dict of tensors")
    odd = [
        name for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if odd:
        place = "its root" if param_key is None else param_key
        if all(isinstance(value, np.ndarray) for value in weights.values()):
            raise CheckpointError(
                f"{path}: {place} holds arrays of numpy ({listing(odd)}), and weights must be tensors; save them anew, "
                "each through torch.from_numpy"
            )
        raise CheckpointError(
            f"{path}: {place} is no state dict, these are no tensors: {listing(odd)}; "
            f"set {key_option} to the key of the weights"
        )
    return unwrapped_weights(weights, own)


def unwrapped_weights(weights: Mapping[str, Tensor], own: Collection[str] | None = None) -> dict[str, Tensor]:
    """A state dict under the names of the network itself, whatever it was wrapped in when it was saved.

    DDP and AveragedModel put ``module.`` before all names, torch.compile ``_orig_mod.``, in any order; a compiled
    part of a network has ``_orig_mod.`` further back. AveragedModel's count ``n_averaged`` is left out.

    Args:
        weights: As saved.
        own: Names of the network's own tensors. Of the ways to read the names, from what stands there to all wrappers
            taken off, the one with most names in common is taken: a network may itself have a part called ``module``.
            None: all wrappers are taken off.
    """
    forms = [dict(weights), *_without_wrappers(weights)]
    if own is None:
        return forms[-1]
    bare = forms[-1]
    # a part wrapped by DDP: only where the network is known, for its own part may be called so
    parts = {
        ".".join(part for part in name.split(".") if part != "module"): value for name, value in bare.items()
    }
    if len(parts) == len(bare):
        forms.append(parts)
    names = frozenset(own)
    best = max(forms, key=lambda form: len(names & form.keys()))  # the first of equals
    return best if names & best.keys() else bare


def _without_wrappers(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state dict with one wrapper taken off, with two, and so on to the last."""
    form = dict(weights)
    for _ in range(_DEEPEST):
        for prefix in ("module.", "_orig_mod."):
            names = [name for name in form if not (prefix == "module." and _is_count(name, form[name]))]
            if names and all(name.startswith(prefix) and name != prefix for name in names):
                form = {name.removeprefix(prefix): form[name] for name in names}
                break
        else:
            bare = {_COMPILED.sub("", name): value for name, value in form.items()}
            if bare.keys() == form.keys() or len(bare) < len(form):
                return
            form = bare
        yield form


def _is_count(name: str, value: Tensor) -> bool:
    return name == "n_averaged" and value.ndim == 0


def _no_key(checkpoint: FlatWeights, param_key: str | None, path: str | Path, key_option: str) -> str | None:
    """A ``.safetensors`` has no keys: the usual ones mean all of it, and another than was written is worth a line."""
    if param_key not in ("auto", "params", "params_ema", "state_dict"):
        return param_key
    held = checkpoint.metadata.get("weights", param_key)
    if param_key in ("params", "params_ema") and held != param_key:
        get_root_logger().warning(
            f"{path}: holds {held}, no other weights are in it ({key_option}: {param_key})"
        )
    return None


def load_weights(
    net: nn.Module,
    path: str | Path,
    *,
    param_key: str | None = "params",
    strict: bool = True,
    option: str = "path.pretrain_network_g",
    required: Sequence[str] = (),
) -> None:
    """Loads weights into a network: all of it or, with an error, nothing.

    Args:
        net: The bare network (not wrapped for DDP).
        path: The file.
        param_key: See ``select_weights``.
        strict: The file's names must be the network's. Otherwise leftovers and absences are ignored, but not
            a shape that differs, nor a file that has no name in common with the network.
        option: The option that named the file, for messages.
        required: Beginnings of names that must be loaded even when not ``strict``.

    Raises:
        CheckpointError: Naming file, option, how much matches and the first names that differ.
    """
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{option}: {error}") from error
    wanted = _tensors(net)
    weights = select_weights(checkpoint, param_key, path, option, wanted)
    if problem := mismatch(weights, net, strict, required):
        raise CheckpointError(f"{option}: {path} {problem}")
    net.load_state_dict(weights, strict=strict)
    loaded = weights.keys() & wanted.keys()
    unused, as_built = len(weights) - len(loaded), len(wanted) - len(loaded)
    get_root_logger().info(
        f"Loaded {len(loaded)} tensors into {type(net).__name__} from {path}"
        + (f"; not used: {unused} of the file, left as built: {as_built}" if unused or as_built else "")
    )


def mismatch(
    weights: Mapping[str, Tensor], net: nn.Module, strict: bool = True, required: Sequence[str] = ()
) -> str | None:
    """Why a state dict does not fit a network, in one line with a few names; None where it fits.

    Args:
        weights: Under the names of the network itself.
        net: The network.
        strict: See ``load_weights``, also for ``required``.
    """
    wanted, network = _tensors(net), type(net).__name__
    common = [name for name in weights if name in wanted]
    differing = _differences(weights, wanted, strict, tuple(required))
    if not differing and (common or not wanted):
        return None
    kind = architecture_name(weights)
    other = kind is not None and kind not in (network, architecture_name(wanted))
    seems = f"it looks like {kind}; " if other else ""
    if 2 * len(common) >= min(len(weights), len(wanted)):
        equal = sum(weights[name].shape == wanted[name].shape for name in common)
        return (
            f"does not fit {network}: {seems or 'another size or scale? '}{equal} of the network's {len(wanted)} "
            f"tensors match ({len(weights)} are in the file): {listing(differing, _FEW if other else SHOWN, '; ')}"
        )
    shared = f"{len(common)} names" if len(common) > 1 else f"{len(common) or 'no'} name"
    return (
        f"does not fit {network}: {seems or 'another architecture? '}{shared} in common of the network's {len(wanted)} "
        f"and the file's {len(weights)}; the file has {listing(list(weights), _FEW)}, the network "
        f"{listing(list(wanted), _FEW)}"
    )


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}


def _differences(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], strict: bool, required: tuple[str, ...]
) -> list[str]:
    found = []
    for name, value in wanted.items():
        if name in weights:
            if weights[name].shape != value.shape:
                found.append(f"{name} {_shape(weights[name])} in the file, {_shape(value)} in the network")
        elif strict or name.startswith(required):
            found.append(f"{name} is not in the file, {_shape(value)} in the network")
    if strict:
        leftovers = (name for name in weights if name not in wanted)
        found += [f"{name} {_shape(weights[name])} in the file, not in the network" for name in leftovers]
    return found


def save_file(obj: Any, path: str | Path) -> None:
    """``torch.save`` that leaves either the whole new file or what was there before, also when killed.

    Args:
        obj: Tensors and plain values (what ``read_checkpoint`` can read).
        path: The file; its folder is made.

    Raises:
        TrainingError: It cannot be written (disk full, no permission).
    """
    atomic_write(path, lambda file: torch.save(obj, file))


def _shape(tensor: Any) -> str:
    return f"({', '.join(map(str, tensor.shape))})" if isinstance(tensor, Tensor) else type(tensor).__name__
