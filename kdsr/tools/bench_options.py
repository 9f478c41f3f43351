"""The options of a benchmark: an option file without its checkpoints and data."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor

from kdsr.data.stored_outputs import KEY
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


class StepSize(NamedTuple):
    """The images of a measured step: so many, in ``accumulate`` batches; ``side`` is that of the ground truth."""

    accumulate: int
    images: int
    side: int
    scale: int

    @classmethod
    def of(cls, opt: dict[str, Any]) -> StepSize:
        train, batches = opt["datasets"]["train"], opt["train"].get("accumulate", 1)
        return cls(batches, train["batch_size_per_gpu"] * batches, train["gt_size"], opt.get("scale") or 1)

    def __str__(self) -> str:
        batches = f"{self.accumulate} batches of " if self.accumulate > 1 else "batch "
        return f"{batches}{self.images // self.accumulate}, {self.side}×{self.side} ground truth"

    def random_images(self) -> dict[str, Tensor]:
        """LQ, GT and the teacher's output, (images, 3, height, width) in [0, 1]."""
        lq, gt, output = (
            torch.rand(self.images, 3, side, side) for side in (self.side // self.scale, self.side, self.side)
        )
        return {"lq": lq, "gt": gt, KEY: output}


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
