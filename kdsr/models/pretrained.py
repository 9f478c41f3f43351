"""Loads the checkpoints that the options name into networks, and exports weights for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.distill.weight_files import each_network, weight_files
from kdsr.runtime.checkpoint import load_weights, read_checkpoint, select_weights
from kdsr.runtime.errors import CheckpointError
from kdsr.runtime.precision import REDUCED
from kdsr.runtime.safetensors_files import SUFFIX, save_safetensors


def log_network(net: nn.Module, key: str, dtype: torch.dtype | None) -> None:
    """Logs type, size and precision of ``network_<key>``, and its own notes."""
    log = get_root_logger()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    word = next((word for word, reduced in REDUCED.items() if reduced is dtype), None)
    fits = dtype not in getattr(net, "not_in", ())
    log.info(
        f"net_{key}: {type(net).__name__}, {parameters:,d} parameters{f', in {word}' if word and fits else ''}"
    )
    for note in getattr(net, "notes", ()):
        log.info(f"net_{key}: {note}")
    if not fits:
        log.warning(f"net_{key}: does not work in {word} (precision), it is computed in float32")


def load_pretrained(net: nn.Module, key: str, opt: dict[str, Any]) -> None:
    """Loads ``path.pretrain_network_<key>`` into ``net``, where the options name one.

    ``path.param_key_<key>``: which weights of the file; by default ``params`` in training and, in a test, the EMA where
    there is one. ``path.strict_load_<key>``: whether the names must be the network's.

    Raises:
        CheckpointError: The file is missing, unreadable or does not fit.
    """
    path = opt["path"]
    file = path.get(f"pretrain_network_{key}")
    if file is None:
        return
    load_weights(
        net,
        file,
        param_key=path.get(f"param_key_{key}", "params" if opt["is_train"] else "auto"),
        strict=path.get(f"strict_load_{key}", True),
        option=f"path.pretrain_network_{key}",
        required=getattr(net, "required_prefixes", ()),
    )


def load_network(
    model: Any, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = "params"
) -> None:
    """``BaseModel.load_network`` for BasicSR's own models, with the reader of this package.

    Args:
        model: The model.
        net: Its network; ``net_g_ema`` gets ``params_ema`` where the file has it, else the weights of ``net_g``.
        load_path: The file.
        strict: Used only for a file that no ``path.pretrain_network_<key>`` names; the options of that one win.
        param_key: Likewise. A resumed run reads ``params`` of its own files.

    Raises:
        CheckpointError: The file is missing, unreadable or does not fit.
    """
    path, bare = model.opt["path"], model.get_bare_model(net)
    named = (
        name for name, file in path.items() if name.startswith("pretrain_network_") and file == load_path
    )
    key = next(named, "").removeprefix("pretrain_network_")
    if not key:
        load_weights(bare, load_path, param_key=param_key, strict=strict, option="path")
        return
    changed = {}
    if path.get("resume_state") and Path(load_path).parent == Path(path["models"]):
        changed = {f"param_key_{key}": "params"}
    if net is getattr(model, "net_g_ema", None) and "params_ema" in read_checkpoint(load_path):
        changed = {f"param_key_{key}": "params_ema"}
    load_pretrained(bare, key, {**model.opt, "path": path | changed})


def warm_start(net: nn.Module, opt: dict[str, Any], teacher: nn.Module | None) -> str | None:
    """Initialises a student from ``path.init_from``: the ``teacher``'s matching blocks, or a checkpoint.

    Returns:
        A line for the log; None without the option.

    Raises:
        CheckpointError: The file cannot be read, or nothing of it fits.
    """
    source = opt["path"].get("init_from")
    if source is None:
        return None
    if source == "teacher":
        assert teacher is not None  # the option check requires one
        weights = dict(teacher.state_dict())
    else:
        weights = select_weights(read_checkpoint(source), "auto", source, "path.init_from", net.state_dict())
    copied, total = copy_matching(net, weights, source)
    return f"net_g starts from {source}: {copied} of {total} tensors taken over"


def copy_matching(net: nn.Module, weights: dict[str, Tensor], source: str) -> tuple[int, int]:
    """Copies every parameter and buffer that ``weights`` has under the same name and in the same shape.

    For example the first blocks of a teacher of equal width (RCAN, EDSR), or all but the upsampler of a ×2 student
    for a ×4 one.

    Args:
        net: The student; changed in place.
        weights: State dict of the source.
        source: Where the weights came from, for the error.

    Returns:
        How many tensors were copied, and how many the student has.

    Raises:
        CheckpointError: When nothing matches.
    """
    own = net.state_dict()
    matching = {
        name for name, tensor in own.items() if name in weights and weights[name].shape == tensor.shape
    }
    # A bias of three channels fits everywhere: it does not count as a match.
    kernels = {name for name, parameter in net.named_parameters() if parameter.dim() > 1}
    if not matching & kernels:
        example = next((name for name in own if name in kernels and name in weights), None)
        why = (
            f"for instance {example} is {tuple(weights[example].shape)} there and {tuple(own[example].shape)} here"
            if example
            else "no name of a parameter is the same"
        )
        raise CheckpointError(
            f"path.init_from: nothing of {source} fits the student ({why}); take the option out"
        )
    with torch.no_grad():
        for name in matching:
            own[name].copy_(weights[name])
    return len(matching), len(own)


def description(opt: Mapping[str, Any]) -> dict[str, Any]:
    """What the student's files say beside the weights, as plain values; stock BasicSR ignores it.

    ``network``: type and arguments; ``scale``; ``value_range`` of its images; ``run``; ``teacher``: type and file of
    each, as text.
    """
    each, files = each_network(opt), weight_files(opt)
    teachers = [
        f"{options['type']} ({Path(files[key]).name})" if files.get(key) else str(options["type"])
        for name, options in each.items()
        if (key := name.removeprefix("network_")).partition(".")[0] in ("t", "tb")
        and name.startswith("network_")
        and isinstance(options, Mapping)
    ]
    return {
        "network": deepcopy(dict(opt["network_g"])),
        "scale": opt.get("scale") or 1,
        "value_range": [0.0, 1.0],
        "run": str(opt.get("name", "")),
        "teacher": ", ".join(teachers),
    }


def export_safetensors(
    weights: Mapping[str, Mapping[str, Tensor]], file: Path, described: Mapping[str, Any], iteration: int
) -> None:
    """Writes the weights that are tested, the EMA's where there is one, as ``.safetensors`` beside a ``.pth``.

    Args:
        weights: State dicts by BasicSR's keys: ``params``, and ``params_ema`` where there is one.
        file: The ``.pth``.
        described: See ``description``; goes into the file's header, what is no text as JSON.
        iteration: Likewise.

    Raises:
        TrainingError: It cannot be written.
    """
    key = "params_ema" if "params_ema" in weights else "params"
    metadata = {**as_text(described), "iteration": str(iteration), "weights": key}
    save_safetensors(weights[key], file.with_suffix(SUFFIX), metadata)


def as_text(described: Mapping[str, Any]) -> dict[str, str]:
    """A description as the text entries of a file's header."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
