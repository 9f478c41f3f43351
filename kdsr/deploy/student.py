"""Proposes a student: the teacher's architecture, narrower and shallower, or a small stock network."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdsr.deploy.architectures import DIV2K_MEAN
from kdsr.deploy.network_file import Found, build, describe, open_network, read_options
from kdsr.runtime.errors import OptionError
from kdsr.runtime.suggestions import nearest

Options = dict[str, Any]
_YAML = (".yml", ".yaml")
_STEPS = 128  # factors of widths and depths that are tried

# type -> its widths, each with the number that it stays a multiple of, and its depths
_WIDTHS = {
    "EDSR": {"num_feat": 4},
    "RCAN": {"num_feat": 16},
    "RRDBNet": {"num_feat": 4, "num_grow_ch": 4},
    "SRVGGNetCompact": {"num_feat": 4},
    "MSRResNet": {"num_feat": 4},
    "SwinIR": {"embed_dim": 4},
    "NAFNet": {"width": 2},
    "Restormer": {"dim": 4},
    "RLFN": {"feature_channels": 2, "esa_channels": 2},
    "PReNet": {"num_feat": 4},
    "SPAN": {"feature_channels": 2},
}
_DEPTHS = {
    "EDSR": ("num_block",),
    "RCAN": ("num_group", "num_block"),
    "RRDBNet": ("num_block",),
    "SRVGGNetCompact": ("num_conv",),
    "MSRResNet": ("num_block",),
    "NAFNet": ("middle_blk_num", "enc_blk_nums", "dec_blk_nums"),
    "Restormer": ("num_blocks", "num_refinement_blocks"),
    "RLFN": ("num_blocks",),
    "PReNet": ("num_block",),
}
_RGB = {"num_in_ch": 3, "num_out_ch": 3}
# networks that are made smaller until they fit; ``scale`` is added
_UPSCALING: dict[str, Options] = {
    "SRVGGNetCompact": {"num_feat": 64, "num_conv": 32, "act_type": "prelu"},
    "EDSR": {**_RGB, "num_feat": 128, "num_block": 32, "res_scale": 1, "img_range": 255.0, "rgb_mean": DIV2K_MEAN},
    "SPAN": {**_RGB, "feature_channels": 96},
    "RLFN": {"feature_channels": 64, "num_blocks": 8, "esa_channels": 16, "img_range": 255.0},
    "MSRResNet": {**_RGB, "num_feat": 64, "num_block": 16},
    "RCAN": {**_RGB, "num_feat": 64, "num_group": 10, "num_block": 20, "squeeze_factor": 16, "img_range": 255.0,
             "rgb_mean": DIV2K_MEAN},
    "SwinIR": {"img_size": 48, "window_size": 8, "embed_dim": 60, "depths": [6, 6, 6, 6], "num_heads": [6, 6, 6, 6],
               "mlp_ratio": 2, "upsampler": "pixelshuffledirect"},
}  # fmt: skip
_SAME_SIZE: dict[str, Options] = {
    "NAFNet": {"width": 32, "middle_blk_num": 12, "enc_blk_nums": [2, 2, 4, 8], "dec_blk_nums": [2, 2, 2, 2]},
    "Restormer": {"dim": 48, "num_blocks": [4, 6, 6, 8], "num_refinement_blocks": 4, "heads": [1, 2, 4, 8]},
    "PReNet": {"num_feat": 32, "recurrent_iter": 6, "num_block": 5},
}


@dataclass(frozen=True)
class Student:
    """A student.

    Attributes:
        options: ``type`` and arguments.
        net: A network of these options with random weights.
        how: Where it comes from, for the user.
        weights: The file of the weights that it starts from.
    """

    options: Options
    net: torch.nn.Module
    how: str
    weights: Path | None = None

    @property
    def parameters(self) -> int:
        return count(self.net)


def parse_size(text: str, teacher: int) -> int:
    """The largest number of parameters: ``10x`` fewer than the teacher's, or a number such as 54000, 300k or 1.2M.

    Raises:
        OptionError: It is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([xkM]?)", text.strip())
    number = float(found[1]) if found else 0
    if not found or number <= (1 if found[2] == "x" else 0):
        raise OptionError(
            f"--size {text!r}: give how many times fewer parameters (10x), or a number of them (54000, 300k, 1.2M)"
        )
    return int(teacher / number if found[2] == "x" else number * {"": 1, "k": 1e3, "M": 1e6}[found[2]])


def propose(
    wanted: str | None, size: str, teacher: Mapping[str, Any], teacher_parameters: int, scale: int
) -> Student:
    """The student of ``--student``, or of the teacher's family, or a stock network.

    Args:
        wanted: A file with a network (option file or checkpoint), a type, or None.
        size: See ``parse_size``; not for files.
        teacher: The teacher's options.
        teacher_parameters: Their number.
        scale: The teacher's.

    Raises:
        OptionError: There is no such network, it is not smaller than the teacher, or has another scale.
        CheckpointError: A file cannot be opened.
    """
    if wanted is not None and (Path(wanted).is_file() or Path(wanted).suffix):
        student = _of_file(wanted)
    else:
        student = _of_type(wanted, parse_size(size, teacher_parameters), teacher, scale)
    if student.parameters >= teacher_parameters:
        option = "--student" if wanted else "--size"
        raise OptionError(
            f"{option} {wanted or size}: the student has {student.parameters:,} parameters, and the teacher only "
            f"{teacher_parameters:,}; a student must be smaller"
        )
    found = describe(student.net, Found(student.options, student.how), "student", "cpu")
    if (found.scale, found.channels_in) != (scale, 3):
        raise OptionError(
            f"--student {wanted}: has scale {found.scale} and {found.channels_in} channels, the teacher scale {scale} "
            "and 3 channels"
        )
    return student


def _of_file(name: str) -> Student:
    path = Path(name).expanduser()
    if path.suffix not in _YAML:
        opened = open_network(path)
        if opened.options is None:
            raise OptionError(
                f"--student {name}: cannot be trained; give a checkpoint of torch, or an option file"
            )
        weights = None if opened.options["type"] == "Spandrel" else path
        return Student(opened.options, opened.net, f"{opened.source}, starts from its weights", weights)
    opt = read_options(path)
    options = opt if "type" in opt else opt.get("network_g")
    if not isinstance(options, dict):
        raise OptionError(f"--student {name}: has neither network_g nor a type at its top level")
    return Student(options, build(Found(options, name)), f"network_g of {name}")


def _of_type(kind: str | None, limit: int, teacher: Mapping[str, Any], scale: int) -> Student:
    stock = _UPSCALING if scale > 1 else _SAME_SIZE
    own = family(teacher)
    if kind is None and own in _WIDTHS or kind == own:
        base, how = dict(teacher), "the teacher's architecture, narrower and shallower"
    else:
        kind = kind or next(iter(stock))
        if kind not in stock:
            raise OptionError(
                f"--student {kind}: is no file, and no network for scale {scale} that kdsr can size; "
                f"{nearest(kind, {*stock, *([own] if own in _WIDTHS else [])})}"
            )
        base, how = _stock(kind, scale), f"{kind} at the asked size"
    options = _largest(base, limit)
    return Student(options, build(Found(options, how)), how)


def _stock(kind: str, scale: int) -> Options:
    options = deepcopy((_UPSCALING if scale > 1 else _SAME_SIZE)[kind])
    if scale > 1:
        options["upscale"] = scale
    if kind == "SPAN":
        return {"type": "SpandrelNet", "architecture": kind, "parameters": options}
    return {"type": kind, **options}


def family(options: Mapping[str, Any]) -> str:
    """The name of an architecture: the type, or spandrel's name."""
    return str(options.get("architecture") or options.get("type"))


def count(net: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def _largest(base: Options, limit: int) -> Options:
    """The largest version of a network with at most ``limit`` parameters: by all sizes, then depths, then widths."""
    least = count(build(Found(shrunk(base, 0, 0), "the smallest student")))
    if least > limit:
        raise OptionError(
            f"--size: the smallest {family(base)} that kdsr proposes has {least:,} parameters, more than {limit:,}; "
            "ask for more, or give another --student"
        )
    both = _bisect(lambda factor: shrunk(base, factor, factor), 0, limit)
    depths = _bisect(lambda factor: shrunk(base, both, factor), both, limit)
    return shrunk(base, _bisect(lambda factor: shrunk(base, factor, depths), both, limit), depths)


def _bisect(made: Callable[[float], Options], low: float, limit: int) -> float:
    """The largest factor up to 1, in steps of 1/128, of a network with at most ``limit`` parameters."""
    first, last = round(low * _STEPS), _STEPS + 1
    while last - first > 1:
        middle = (first + last) // 2
        fits = count(build(Found(made(middle / _STEPS), "a student"))) <= limit
        first, last = (middle, last) if fits else (first, middle)
    return first / _STEPS


def shrunk(options: Options, widths: float, depths: float) -> Options:
    """A network with widths and depths times factors of at most 1, rounded, at least one step or block."""
    kind, new = family(options), deepcopy(options)
    inner = new.get("parameters", new)
    for key, step in _WIDTHS[kind].items():
        if kind in ("SwinIR", "Restormer"):  # widths are divided among heads
            step = math.lcm(step, *inner.get("num_heads", ()), *inner.get("heads", (1, 2, 4, 8)))
        width = inner.get(key, step)
        inner[key] = min(width, max(step, round(width * widths / step) * step))
    for key in _DEPTHS.get(kind, ()):
        value = inner.get(key, 1)
        inner[key] = [_fewer(n, depths) for n in value] if isinstance(value, list) else _fewer(value, depths)
    if kind == "SwinIR":
        groups = _fewer(len(inner["depths"]), depths)
        inner["depths"], inner["num_heads"] = inner["depths"][:groups], inner["num_heads"][:groups]
    return new


def _fewer(number: int, factor: float) -> int:
    return max(min(number, 1), round(number * factor))
