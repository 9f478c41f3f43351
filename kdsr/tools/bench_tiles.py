"""``kdsr bench tiles``: time and memory of a large image, in tiles of several sizes and whole.

Each case runs in a new process, because a process does not release all of its memory. Measured are the restoration and
the conversion to 8 bits, as in a test, with random weights and a random image.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from basicsr.models import build_model
from basicsr.utils import set_random_seed
from basicsr.utils.registry import MODEL_REGISTRY
from torch.utils.data import DataLoader

from kdsr.models.evaluation import evaluate
from kdsr.models.tiling import tile_problems
from kdsr.models.trainer import LoopInterface
from kdsr.options.check import check
from kdsr.runtime.errors import DataError, OptionError
from kdsr.tools.bench_options import Device, read
from kdsr.tools.machine import machine
from kdsr.tools.report import as_markdown
from kdsr.tools.step_clock import Memory


@dataclass(frozen=True)
class Cost:
    """Forward passes, largest input (H, W), seconds, MiB before, peak MiB."""

    passes: int
    largest: tuple[int, int]
    seconds: float
    before: float
    peak: float


def prepare(file: str | Path, overrides: Sequence[str] = (), device: Device = Device.cpu) -> dict[str, Any]:
    """The options of a training or test file for a model in a test, without checkpoints and data.

    Raises:
        OptionError: The options are invalid, the model is BasicSR's own, or the device is missing.
    """
    opt = read(file, overrides, device)
    problems = [
        problem for problem in check(opt, "train" in opt) if not problem.startswith(("datasets.", "path."))
    ]
    if problems:
        raise OptionError(problems)
    if not issubclass(MODEL_REGISTRY.get(opt["model_type"]), LoopInterface):
        raise OptionError(
            f"model_type: {opt['model_type']} is BasicSR's own, which restores whole images only"
        )
    derived = {"is_train": False, "dist": False, "rank": 0, "world_size": 1}
    return {**opt, **derived, "num_gpu": int(device == Device.cuda), "val": opt.get("val") or {}}


def measure(opt: dict[str, Any], width: int, height: int) -> Cost:
    """Restores one random image of width × height LQ pixels with the settings in ``opt["val"]``.

    Raises:
        DataError: Out of memory.
    """
    set_random_seed(0)
    model = build_model(opt)
    seen: list[tuple[int, int]] = []
    model.net_g.register_forward_pre_hook(lambda net, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    images: Any = [{"lq": torch.rand(3, height, width), "lq_path": f"{width}x{height}.png"}]
    loader: DataLoader[Any] = DataLoader(images)
    memory = Memory(model.device)
    memory.start()
    before = memory.peak()
    start = time.perf_counter()
    evaluate(model.restore, loader, None, model.device)  # returns CPU images: includes the GPU's time
    seconds = time.perf_counter() - start
    return Cost(len(seen), max(seen, key=math.prod), seconds, before, memory.peak())


@dataclass(frozen=True)
class Run:
    """The arguments of a measurement, picklable for a new process."""

    file: str
    overrides: tuple[str, ...]
    device: Device
    size: tuple[int, int]
    threads: int

    def __call__(self, val: dict[str, Any]) -> Cost:
        """``measure`` in this process, with these additional options in ``val``."""
        logging.disable(logging.INFO)
        torch.set_num_threads(self.threads)
        opt = prepare(self.file, self.overrides, self.device)
        return measure({**opt, "val": opt["val"] | val}, *self.size)

    def in_new_process(self, val: dict[str, Any]) -> Cost | None:
        """The same in a new process; None if out of memory."""
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                return pool.submit(self, val).result()
            except (DataError, BrokenProcessPool):  # allocation failed; killed by the system
                return None


def summary(costs: dict[str, Cost | None]) -> pd.DataFrame:
    """The table as text, a row per tile size."""
    table = pd.DataFrame(columns=["passes", "largest input", "s", "peak MiB"], dtype=object)
    for name, cost in costs.items():
        if cost is None:
            table.loc[name] = ["", "", "", "does not fit"]
            continue
        peak = "–" if math.isnan(cost.peak) else f"{cost.peak:,.0f}"
        largest = f"{cost.largest[1]}×{cost.largest[0]}"
        table.loc[name] = [str(cost.passes), largest, f"{cost.seconds:.1f}", peak]
    table.index.name = "tile"
    return table


def parse_size(text: str) -> tuple[int, int]:
    """Parses ``3840x2160`` into width and height, or raises an ``OptionError``."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise OptionError(
            f"--size: {text!r} is not a size; give WIDTHxHEIGHT in LQ pixels, such as 3840x2160"
        )
    return int(width), int(height)


def tiles(
    opt: Annotated[str, typer.Option("-opt", "--opt", help="Option file of a training or a test.")],
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the LQ image.")] = "3840x2160",
    tile: Annotated[
        list[int] | None, typer.Option(help="Side of a tile; may be repeated. Default: 256, 512")
    ] = None,
    overlap: Annotated[int | None, typer.Option(help="val.tile_overlap of all tile sizes.")] = None,
    whole: Annotated[bool, typer.Option(help="Also measure the whole image at once.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    device: Annotated[Device, typer.Option(help="What to measure on.")] = Device.cpu,
    force_yml: Annotated[
        list[str] | None, typer.Option("--force_yml", "--force-yml", help="KEY:KEY=VALUE, as in training.")
    ] = None,
) -> None:
    """Measure time and peak memory of one large image, in tiles and whole, with random weights and no data."""
    options = prepare(opt, force_yml or (), device)
    run = Run(opt, tuple(force_yml or ()), device, parse_size(size), threads)
    width, height = run.size
    kinds = {str(side): {"tile": side, "tile_overlap": overlap} for side in tile or (256, 512)}
    problems = [problem for val in kinds.values() for problem in tile_problems(val)]
    if problems:
        raise OptionError(problems)
    if whole:
        kinds["whole image"] = {"tile": None, "tile_overlap": None}
    costs = {name: run.in_new_process(val) for name, val in kinds.items()}
    scale = options.get("scale") or 1
    result = 3 * width * height * scale**2 * 4 / 2**20
    before = max((cost.before for cost in costs.values() if cost is not None), default=math.nan)
    measured = "memory of the process" if device == Device.cpu else "memory allocated by torch on the GPU"
    typer.echo(
        f"One {width}×{height} image ×{scale}, {options['name']}. {machine(device, threads)}.\n"
        f"Peak MiB: {measured}; {before:,.0f} MiB before. The result has {result:,.0f} MiB in float32.\n\n"
        f"{as_markdown(summary(costs))}"
    )
