"""Opens a network from a file alone: a checkpoint, a safetensors file, or an exported ONNX file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from kdsr.archs.spandrel_arch import Spandrel
from kdsr.deploy.recognise import recognise
from kdsr.distill.weight_files import each_network, weight_files
from kdsr.models.restorer import declared_multiple
from kdsr.options.authors import translate
from kdsr.options.files import load
from kdsr.options.signatures import check_call, find_type, registered
from kdsr.options.tested_run import option_file_of
from kdsr.options.user_modules import import_user_modules
from kdsr.runtime.atomic_files import display_path
from kdsr.runtime.checkpoint import mismatch, read_checkpoint, select_weights
from kdsr.runtime.errors import CheckpointError, OptionError
from kdsr.runtime.memory import limit_network_size
from kdsr.runtime.safetensors_files import FlatWeights

_AS_TEXT = frozenset(("run", "teacher", "psnr", "licence"))
DESCRIBED = _AS_TEXT | {
    "network",
    "scale",
    "value_range",
    "multiple_of",
    "smallest",
}  # what a file may say of its network
_SMALLEST = 32  # side of the image that a network is tried on


@dataclass(frozen=True)
class OpenedNetwork:
    """A network and what is known of it.

    Attributes:
        net: In eval mode, without gradients: (N, C, H, W) in [0, 1] to (N, C', H·scale, W·scale), about [0, 1].
        options: ``type`` and arguments, as in an option file; None for a network that has none.
        scale: Upscaling factor.
        multiple_of: What H and W must be multiples of.
        channels_in: C.
        channels_out: C'.
        source: Which architecture, and how it was found; a line for the user.
        fixed_size: The only H and W that it takes; None: any.
        licence: As the file states it.
        described: All that the file says of its network.
        notes: Further lines: the run, the teacher, what the network itself says.
    """

    net: Any
    options: dict[str, Any] | None
    scale: int
    multiple_of: int
    channels_in: int
    channels_out: int
    source: str
    fixed_size: tuple[int, int] | None = None
    licence: str | None = None
    notes: tuple[str, ...] = ()
    described: Mapping[str, Any] = field(default_factory=dict)


class Found(NamedTuple):
    """Options of a network (``type`` and arguments), and how they were found, for the user."""

    options: dict[str, Any] | None
    how: str


def open_network(
    path: str | Path, opt: str | Path | None = None, device: str | torch.device = "cpu"
) -> OpenedNetwork:
    """Opens a network; ``params_ema`` is preferred to ``params``, as in tests.

    The architecture is that of ``opt``. Without it the first of these that fits the weights: the file's own
    description; the option file of the run that the file lies in (``experiments/NAME/*.yml`` beside ``models/``); the
    one that names and shapes of the tensors tell; the one that spandrel recognises.

    Args:
        path: ``.pth``, ``.ckpt``, ``.safetensors`` or ``.onnx``.
        opt: An option file with the network: the one whose ``path.pretrain_network_X`` is this file, else
            ``network_g``.
        device: Where the network computes.

    Raises:
        CheckpointError: The file is no checkpoint, is of an unknown architecture, or does not fit.
        OptionError: The option file is wrong, or the device is missing.
    """
    path = Path(path).expanduser()
    require_device(device)
    if path.suffix == ".onnx":
        from kdsr.deploy.onnx_network import open_onnx

        return open_onnx(path, device)
    checkpoint = read_checkpoint(path)
    if "optimizers" in checkpoint and "networks" in checkpoint:
        raise CheckpointError(f"{path}: is the state of a training; give its weights, models/net_g_N.pth")
    described = description_in(checkpoint)
    weights = select_weights(checkpoint, "auto", path, str(path))
    problems: list[str] = []
    for found in _candidates(path, opt, described, weights):
        try:
            net = build(found)
            own = select_weights(checkpoint, "auto", path, str(path), net.state_dict())
        except OptionError as error:
            if opt:
                raise
            problems += error.problems
            continue
        if (problem := mismatch(own, net)) is None:
            net.load_state_dict(own)
            break
        problems.append(f"{path} {problem} (the network {found.how})")
    else:
        net, found = _of_spandrel(path, problems, opt)
    return with_description(describe(net, found, path, device), described)


def describe(
    net: nn.Module,
    found: Found,
    name: str | Path,
    device: str | torch.device,
    fixed_size: tuple[int, int] | None = None,
) -> OpenedNetwork:
    """A network on ``device``, ready for use; scale and channels are those of a small image that it restores.

    Raises:
        CheckpointError: It gives no image.
    """
    net = net.to(device).eval().requires_grad_(False)
    multiple = declared_multiple(net)
    side = -(-_SMALLEST // multiple) * multiple
    height, width = fixed_size or (side, side)
    result, reason = None, ""
    for channels in (3, 1, *(value.shape[1] for value in net.parameters() if value.ndim == 4)):
        try:
            with torch.no_grad():
                result = net(torch.full((1, channels, height, width), 0.5, device=device))
            break
        except Exception as error:  # of any architecture, or of onnxruntime
            reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
    kind = (found.options or {}).get("type", type(net).__name__)
    if not isinstance(result, Tensor):
        raise CheckpointError(f"{name}: {kind} gives no image ({reason or 'its output is no tensor'})")
    scale = result.shape[-1] // width
    if result.ndim != 4 or result.shape[-2:] != (height * scale, width * scale):
        raise CheckpointError(f"{name}: {kind} gives no image of its input's size or a multiple of it")
    return OpenedNetwork(
        net=net,
        options=found.options,
        scale=scale,
        multiple_of=multiple,
        channels_in=channels,
        channels_out=result.shape[1],
        source=f"{kind}, scale {scale}, {found.how}",
        fixed_size=fixed_size,
    )


def description_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of its network (see ``models.pretrained.description``); empty where it says nothing."""
    if isinstance(checkpoint, FlatWeights):
        return description_of_text(checkpoint.metadata)
    return {key: value for key, value in checkpoint.items() if key in DESCRIBED}


def description_of_text(metadata: Mapping[str, str]) -> dict[str, Any]:
    """A description from the text entries of a file's header; entries of another program's kind are left out."""
    found: dict[str, Any] = {}
    for key in DESCRIBED & metadata.keys():
        with contextlib.suppress(json.JSONDecodeError):
            found[key] = metadata[key] if key in _AS_TEXT else json.loads(metadata[key])
    return found


def with_description(opened: OpenedNetwork, described: dict[str, Any]) -> OpenedNetwork:
    """Adds what the file says of its network's origin."""
    origin = (f"{key}: {value}" for key in ("run", "teacher", "psnr") if (value := described.get(key)))
    notes = (*origin, *getattr(opened.net, "notes", ()))
    return replace(opened, described=described, notes=notes, licence=described.get("licence"))


def build(found: Found) -> nn.Module:
    """A network with random weights, from its options.

    Raises:
        OptionError: There is no such type, or its arguments are wrong.
    """
    options, place = found.options or {}, f"network ({found.how})"
    problems: list[str] = []
    network: Any = find_type(options, registered(ARCH_REGISTRY), place, problems)
    if network is not None:
        check_call(network, options, place, problems)
        if not problems and hasattr(network, "option_problems"):
            problems += [f"{place}.{problem}" for problem in network.option_problems(options)]
    if problems:
        raise OptionError(problems)
    try:
        with torch.random.fork_rng(devices=[]), limit_network_size(place):
            return network(**{key: value for key, value in options.items() if key != "type"})
    except OptionError:
        raise
    except Exception as error:  # any error of an architecture
        reason = (str(error).splitlines() or [""])[0]
        raise OptionError(
            f"{place}: {options['type']} cannot be built ({type(error).__name__}: {reason})"
        ) from error


def read_options(file: str | Path) -> dict[str, Any]:
    """An option file with its pieces, and the user's modules that it names imported.

    Raises:
        OptionError: It cannot be read.
    """
    warnings: list[str] = []
    opt = load(file)
    if problems := translate(opt, warnings):
        raise OptionError(problems)
    import_user_modules(opt, file, warnings)
    return opt


def require_device(device: str | torch.device) -> None:
    """Raises an ``OptionError`` for a GPU that torch does not find, and for what is no device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise OptionError(f"--device {device}: is no device; give cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {device}: torch finds no GPU; omit it to use the CPU")


def _candidates(
    path: Path, opt: str | Path | None, described: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Iterator[Found]:
    """The networks that the file may hold, most certain first."""
    if opt is not None:
        yield _of_option_file(path, opt)
        return
    if isinstance(described.get("network"), dict) and "type" in described["network"]:
        yield Found(dict(described["network"]), "described in the file")
    if path.absolute().parent.name == "models":
        with contextlib.suppress(OptionError):  # no run
            yield _of_option_file(path, option_file_of(str(path.absolute().parent.parent)))
    if (options := recognise(weights)) is not None:
        yield Found(options, "recognised by its tensors")


def _of_option_file(path: Path, file: str | Path) -> Found:
    opt = each_network(read_options(file))
    files = weight_files(opt)
    same = (
        key
        for key, given in files.items()
        if given and Path(given).expanduser().absolute() == path.absolute()
    )
    key = f"network_{next(same, 'g')}"
    if not isinstance(opt.get(key), dict):
        raise OptionError(f"{file}: has no {key}, whose weights {path} should be")
    return Found(dict(opt[key]), f"{key} of {display_path(file)}")


def _of_spandrel(path: Path, problems: list[str], opt: str | Path | None) -> tuple[nn.Module, Found]:
    if opt is None:
        try:
            options = {"type": "Spandrel", "path": str(path)}
            return Spandrel(str(path)), Found(options, "recognised by spandrel")
        except CheckpointError as error:
            problems = problems or error.problems
    raise CheckpointError(
        [
            *problems,
            "give the option file that the network was trained with, or one with its network_g: --opt FILE",
        ]
    )
