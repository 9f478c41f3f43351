"""Reads and writes checkpoints: tensors and plain values only, with errors that name what is wrong.

Nothing that a file has pickled is ever run. ``torch.load`` reads with ``weights_only=True``; a Lightning file
(taming-transformers' VQGAN) also pickles its callbacks, whose known names are mapped to empty stubs, so that
Lightning need not be installed. Any other name in a file is refused.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.runtime.errors import CheckpointError
from kdsr.runtime.files import write_whole

SHOWN = 5  # differing parameters, or keys, that a message lists

# What Lightning's trainer puts beside the weights: callbacks by class, and hyperparameters in its own dict.
_LIGHTNING_CALLBACKS = (
    "callbacks.base.Callback",
    "callbacks.callback.Callback",
    "callbacks.early_stopping.EarlyStopping",
    "callbacks.gpu_stats_monitor.GPUStatsMonitor",
    "callbacks.lr_monitor.LearningRateMonitor",
    "callbacks.model_checkpoint.ModelCheckpoint",
    "callbacks.progress.ProgressBar",
    "callbacks.stochastic_weight_avg.StochasticWeightAveraging",
    "callbacks.timer.Timer",
    "callbacks.weight_averaging.WeightAveraging",
)
_LIGHTNING_DICTS = ("utilities.parsing.AttributeDict",)
_LIGHTNING_PACKAGES = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")


class _Inert:
    """Stands for a pickled object: takes any arguments and any state, keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertDict:
    """Stands for a dict type: unpickles to an ordinary dict (the reader fills no other type)."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _lightning_stubs() -> list[tuple[Callable[..., Any], str]]:
    # One class per name: where classes are keys of a dict, they must not collide.
    return [
        (type(name.rpartition(".")[2], (base,), {}), f"{package}.{name}")
        for package in _LIGHTNING_PACKAGES
        for base, names in ((_Inert, _LIGHTNING_CALLBACKS), (_InertDict, _LIGHTNING_DICTS))
        for name in names
    ]


def _pickled_names(path: Path) -> list[str]:
    """Names that a file asks for, by reading its pickle instructions without following them."""
    names: list[str] = []
    strings: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = b"".join(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
        else:
            data = path.read_bytes()
        while data:
            end = 0
            for opcode, argument, position in pickletools.genops(data):
                end = (position or 0) + 1
                if opcode.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
            data = data[end:]
    except Exception:  # a damaged file: the names read so far are all there are
        return names
    return names


def _refused_names(path: Path, allowed: Iterable[str]) -> list[str]:
    known = set(allowed) | set(torch._weights_only_unpickler._get_allowed_globals())
    return [name for name in dict.fromkeys(_pickled_names(path)) if name not in known]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a file of ``torch.save`` to the CPU: tensors and plain values only.

    Args:
        path: BasicSR ``.pth`` or ``.state``, a bare state dict, or a Lightning ``.ckpt``.

    Returns:
        The dict in the file; pickled Lightning objects are empty stubs in it.

    Raises:
        CheckpointError: Missing, unreadable (truncated, no checkpoint), no dict, or a file that pickles
            anything but tensors, plain values and Lightning's own bookkeeping; those names are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file{' (it is a folder)' if path.is_dir() else ''}")
    stubs = _lightning_stubs()
    try:
        with torch.serialization.safe_globals([*stubs]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged files, all meaning: not readable
        refused = _refused_names(path, (name for _, name in stubs))
        if refused:
            raise CheckpointError(
                f"{path}: refused, it holds pickled code beside tensors: {_listing(refused)}; nothing of it "
                "was run. Save the weights alone with torch.save(net.state_dict(), ...)"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"{path}: cannot be read as a torch checkpoint, truncated or something else? ({reason})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def select_weights(
    checkpoint: Mapping[str, Any], param_key: str | None, path: str | Path, option: str
) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without DDP's ``module.`` in its names.

    Args:
        checkpoint: What ``read_checkpoint`` gave.
        param_key: Key of the weights; None: the checkpoint is the state dict itself; ``auto``: the first
            there is of ``params_ema``, ``params``, ``state_dict``, else the checkpoint itself. ``params_ema``
            falls back to ``params`` with a warning (the DCKD release's options rely on that).
        path: The file, for messages.
        option: The option that named the file (``path.pretrain_network_t``), for messages.

    Raises:
        CheckpointError: The key is absent, or what it names is no dict of tensors.
    """
    key_option = option.replace("pretrain_network_", "param_key_")
    if param_key == "auto":
        param_key = next((key for key in ("params_ema", "params", "state_dict") if key in checkpoint), None)
    if param_key == "params_ema" and param_key not in checkpoint and "params" in checkpoint:
        get_root_logger().warning(f"{path}: no params_ema in it, its params are loaded ({key_option})")
        param_key = "params"
    if param_key is not None and param_key not in checkpoint:
        bare = bool(checkpoint) and all(isinstance(value, Tensor) for value in checkpoint.values())
        keys = f"keys there are: {_listing(list(checkpoint))}"
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
            f"{path}: {place} is no state dict, these are no tensors: {_listing(odd)}; "
            f"set {key_option} to the key of the weights"
        )
    return {name.removeprefix("module."): value for name, value in weights.items()}


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
            f"{_listing(list(weights))}, the network with {_listing(list(wanted))}"
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


def _listing(names: Sequence[Any]) -> str:
    shown = ", ".join(str(name) for name in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
