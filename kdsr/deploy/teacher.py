"""Opens a teacher, and measures what its tensors do not show: the range of values, a mean, a number of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdsr.data.resize import imresize
from kdsr.deploy.image_pairs import Image
from kdsr.deploy.network_file import Found, OpenedNetwork, build, describe, open_network
from kdsr.deploy.recognise import closest, recognised
from kdsr.models.image_metrics import as_image, baseline_image, baseline_name
from kdsr.models.psnr_ssim import psnr
from kdsr.models.restorer import Restorer
from kdsr.runtime.checkpoint import read_checkpoint, select_weights
from kdsr.runtime.errors import CheckpointError, OptionError

_TILE = 512  # LQ pixels
_EQUAL = 100.0  # dB, of equal images


@dataclass(frozen=True)
class Teacher:
    """A teacher.

    Attributes:
        file: Its checkpoint.
        opened: The network and what is known of it.
        options: ``type`` and arguments.
        candidates: Sets of options that fit its tensors; more than one if only images tell which is right.
        unknown: Names of the options in which they differ.
    """

    file: Path
    opened: OpenedNetwork
    options: dict[str, Any]
    candidates: tuple[dict[str, Any], ...]
    unknown: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.opened.net.parameters())


def open_teacher(file: Path, opt: Path | None, device: str) -> Teacher:
    """Opens a teacher: see ``open_network``.

    Raises:
        CheckpointError: The file is no checkpoint, or of an unknown architecture; the message names the nearest.
        OptionError: It is no network for colour images that can be trained with, or the option file is wrong.
    """
    try:
        opened = open_network(file, opt, device)
    except CheckpointError as error:
        if opt is None and (near := _nearest(file)):
            raise CheckpointError(
                [*error.problems, f"{file}: the nearest architecture that kdsr knows is {near}"]
            ) from error
        raise
    if opened.options is None:
        raise OptionError(
            f"{file}: an exported network is no teacher; give the checkpoint that it was exported from"
        )
    if opened.channels_in != 3 or opened.channels_out != 3:
        raise OptionError(
            f"{file}: has {opened.channels_in} input and {opened.channels_out} output channels; kdsr distill is for "
            "colour images, write an option file for others (docs/options.md)"
        )
    found = recognised(opened.net.state_dict()) if "recognised by its tensors" in opened.source else None
    if found is None:
        return Teacher(file, opened, opened.options, (opened.options,))
    return Teacher(file, opened, found.options, found.candidates, found.unknown)


def _nearest(file: Path) -> str | None:
    try:
        return closest(select_weights(read_checkpoint(file), "auto", file, str(file)))
    except CheckpointError:
        return None


def restored(net: nn.Module, image: Image, scale: int) -> Image:
    """Restores a BGR image of 8 bits, (H, W, 3), in tiles if it is large."""
    device = next(net.parameters()).device
    lq = torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))).float().div(255)[None]
    with torch.no_grad():
        return as_image(Restorer({"val": {"tile": _TILE}, "scale": scale})(net, lq.to(device)))


@dataclass(frozen=True)
class Measured:
    """Options of a teacher, measured.

    Attributes:
        teacher: With the best options.
        lines: What was measured, for the user.
        psnr: Of the best options, in dB.
        baseline: Of the image without a network.
        has_gt: Whether it was measured against ground truth.
    """

    teacher: Teacher
    lines: tuple[str, ...]
    psnr: float
    baseline: float
    has_gt: bool


def measure(teacher: Teacher, samples: Sequence[tuple[Image, Image | None]]) -> Measured:
    """Measures every candidate on some images, and takes the best.

    Without ground truth, the output is reduced to the input's size and compared with the input.

    Args:
        teacher: See ``open_teacher``.
        samples: LQ images and ground truth, 8 bits, BGR.
    """
    scale = teacher.opened.scale
    baseline = _mean([_psnr(baseline_image(lq, scale), lq, gt, scale) for lq, gt in samples])
    scores, nets = [], []
    for candidate in teacher.candidates:
        net = _with_options(teacher, candidate)
        scores.append(_mean([_psnr(restored(net, lq, scale), lq, gt, scale) for lq, gt in samples]))
        nets.append(net)
    best = max(range(len(scores)), key=lambda index: scores[index])
    options, net = teacher.candidates[best], nets[best]
    chosen = replace(teacher, options=options, opened=replace(teacher.opened, net=net, options=options))
    has_gt = samples[0][1] is not None
    reduced = "the reduced output" if scale > 1 else "the output"
    against = "the ground truth" if has_gt else f"{reduced} against the input, for want of ground truth"
    lines = [
        f"PSNR on {len(samples)} training images: {_shown(scores[best])} ({against}), {baseline_name(scale)} "
        f"{_shown(baseline)}"
    ]
    if teacher.unknown:
        second = max(
            (index for index in range(len(scores)) if index != best), key=lambda index: scores[index]
        )
        other = teacher.candidates[second]
        differing = [name for name in teacher.unknown if other[name] != options[name]]
        lines.append(
            f"measured, not shown by tensors: {_values(options, teacher.unknown)}; next best: "
            f"{_values(other, differing)} with {_shown(scores[second])}"
        )
    return Measured(chosen, tuple(lines), scores[best], baseline, has_gt)


def _with_options(teacher: Teacher, options: Mapping[str, Any]) -> nn.Module:
    if options == teacher.opened.options:
        return teacher.opened.net
    net = build(Found(dict(options), "a candidate"))
    net.load_state_dict(teacher.opened.net.state_dict())
    device = next(teacher.opened.net.parameters()).device
    return describe(net, Found(dict(options), ""), teacher.file, device).net


def _psnr(image: Image, lq: Image, gt: Image | None, scale: int) -> float:
    """PSNR against the ground truth, or of the reduced image against the LQ one; at most 100 dB."""
    if gt is None:
        image, gt = (imresize(image, 1 / scale) if scale > 1 else image), lq
        scale = 1
    return min(psnr(image, gt, scale if scale > 1 else 0, test_y_channel=True), _EQUAL)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _shown(decibel: float) -> str:
    return f"{decibel:.2f} dB" if decibel < _EQUAL else "equal"


def _values(options: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_short(options[name])}" for name in names)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(f"{number:g}" for number in value)
    return value if isinstance(value, str) else f"{value:g}"
