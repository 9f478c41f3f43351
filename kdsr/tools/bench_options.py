"""The options of a benchmark: an option file without its checkpoints and data."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import typer
from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.kd_model import KDModel
from kdsr.options.authors import translate
from kdsr.options.check import check
from kdsr.options.check_geometry import check_geometry
from kdsr.options.files import load
from kdsr.options.user_modules import import_user_modules
from kdsr.runtime.errors import OptionError


class Device(StrEnum):
    """The device of the measurement."""

    cpu = "cpu"
    cuda = "cuda"


def read(file: str | Path, overrides: Sequence[str], device: Device) -> dict[str, Any]:
    """Reads an option file without its checkpoints, and imports its modules.

    Raises:
        OptionError: It cannot be read, or the device does not exist.
    """
    if device == Device.cuda and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch finds no GPU; omit it to measure the CPU")
    opt = {**load(file, overrides), "path": {}}
    warnings: list[str] = []
    if problems := translate(opt, warnings):
        raise OptionError(problems)
    import_user_modules(opt, file, warnings)
    for warning in warnings:
        typer.echo(f"Warning: {warning}", err=True)
    return opt


def prepare(file: str | Path, overrides: Sequence[str] = (), device: Device = Device.cpu) -> dict[str, Any]:
    """Reads and checks an option file for a model without checkpoints and data.

    Raises:
        OptionError: The options are invalid, the model is not a KDModel, or the device does not exist.
    """
    opt = read(file, overrides, device)
    problems = [problem for problem in check(opt, True) if not problem.startswith(("datasets.", "path."))]
    problems = problems or _size_problems(opt)
    if problems:
        raise OptionError(problems)
    if not issubclass(MODEL_REGISTRY.get(opt["model_type"]), KDModel):
        raise OptionError(f"model_type: bench step supports KDModel and its presets, not {opt['model_type']}")
    derived = {"is_train": True, "dist": False, "rank": 0, "world_size": 1}
    return {**opt, **derived, "num_gpu": int(device == Device.cuda)}


def _size_problems(opt: dict[str, Any]) -> list[str]:
    """Checks the size of the images; problems of their files do not matter here."""
    datasets = opt.get("datasets")
    train = datasets.get("train") if isinstance(datasets, dict) else None
    size, place = train.get("gt_size") if isinstance(train, dict) else None, "datasets.train.gt_size"
    if size is None:
        return [f"{place}: is required; it is the size of the images in the measured step"]
    if type(size) is not int or size < 1:
        return [f"{place}: must be a number of pixels, not {size!r}"]
    if size % opt.get("scale", 1):
        return [f"{place}: {size} is not a multiple of the scale {opt['scale']}"]
    found: list[str] = []
    check_geometry(opt, True, found)
    return [problem for problem in found if problem.startswith(place)]
