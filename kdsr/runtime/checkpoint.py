"""Reads and writes checkpoints: tensors and plain values only, with errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.runtime.errors import CheckpointError
from kdsr.runtime.files import write_whole
from kdsr.runtime.safetensors_files import FlatWeights, is_safetensors, read_safetensors, save_safetensors
from kdsr.runtime.torch_files import SHOWN, listing, read_torch_file

__all__ = ["load_weights", "read_checkpoint", "save_file", "save_safetensors", "select_weights"]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a file of ``torch.save``, or a ``.safetensors``, to the CPU: tensors and plain values only.

    Nothing that a file has pickled is ever run.

    Args:
        path: BasicSR ``.pth`` or ``.state``, a bare state dict, a Lightning ``.ckpt``, or a ``.safetensors``.

    Returns:
        The dict in the file, as plain dicts, lists and tuples; pickled Lightning objects are empty stubs in it.
        Of a ``.safetensors`` the state dict, as ``FlatWeights``.

    Raises:
        CheckpointError: Missing, unreadable (truncated, damaged, no checkpoint), no dict, or a file that pickles
            anything but tensors, plain values and Lightning's own bookkeeping; those names are listed.
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
    checkpoint: Mapping[str, Any], param_key: str | None, path: str | Path, option: str
) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without DDP's ``module.`` in its names.

    Args:
        checkpoint: What ``read_checkpoint`` gave.
        param_key: Key of the weights; None: the checkpoint is the state dict itself; ``auto``: the first
            there is of ``params_ema``, ``params``, ``state_dict``, else the checkpoint itself. ``params_ema``
            falls back to ``params`` with a warning (the DCKD release's options rely on that). A
            ``.safetensors`` is the state dict itself whichever of these keys is given.
        path: The file, for messages.
        option: The option that named the file (``path.pretrain_network_t``), for messages.

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
        raise CheckpointError(
            f"{path}: {place} is no state dict, these are no tensors: {listing(odd)}; "
            f"set {key_option} to the key of the weights"
        )
    return {name.removeprefix("module."): value for name, value in weights.items()}


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
        CheckpointError: Naming file, option and the first differing parameters with both shapes.
    """
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{option}: {error}") from error
    weights = select_weights(checkpoint, param_key, path, option)
    wanted = {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}
    differing = _differences(weights, wanted, strict, tuple(required))
    if differing:
        rest = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise CheckpointError(
            f"{option}: {path} does not fit {type(net).__name__} (other architecture, size or scale?): "
            f"{'; '.join(differing[:SHOWN])}{rest}"
        )
    loaded = weights.keys() & wanted.keys()
    if not loaded:
        raise CheckpointError(
            f"{option}: {path} has no name in common with {type(net).__name__}; the file begins with "
            f"{listing(list(weights))}, the network with {listing(list(wanted))}"
        )
    net.load_state_dict(weights, strict=strict)
    unused, as_built = len(weights) - len(loaded), len(wanted) - len(loaded)
    get_root_logger().info(
        f"Loaded {len(loaded)} tensors into {type(net).__name__} from {path}"
        + (f"; not used: {unused} of the file, left as built: {as_built}" if unused or as_built else "")
    )


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
    write_whole(path, lambda file: torch.save(obj, file))


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
