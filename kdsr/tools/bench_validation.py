"""``kdsr bench validation``: the time of a validation beside that of BasicSR's own loop.

Both measure the same network on the same images, in turn. The network's passes are timed by hooks, on a GPU by events,
so that nothing waits for them. *Outside* is the rest of the time: loading, conversion, metrics, saving.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cv2
import pandas as pd
import torch
import typer
from basicsr.data import build_dataloader, build_dataset
from basicsr.models import build_model
from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.trainer import LoopInterface
from kdsr.options.parse import parse_options
from kdsr.options.signatures import registered
from kdsr.pipeline.run_data import make_dataset
from kdsr.runtime.errors import OptionError
from kdsr.tools.bench_options import Device
from kdsr.tools.machine import machine
from kdsr.tools.report import as_markdown

Values = dict[str, dict[str, float]]


@dataclass
class PassTimes:
    """Number and time of a network's passes, by hooks."""

    net: torch.nn.Module
    images: list[int] = field(default_factory=list)
    _marks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.on_gpu = next(self.net.parameters()).is_cuda
        self.net.register_forward_pre_hook(lambda net, inputs: self._mark(len(inputs[0])))
        self.net.register_forward_hook(lambda *_: self._mark())

    def _mark(self, images: int | None = None) -> None:
        if images is not None:
            self.images.append(images)
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> float:
        """The seconds in all passes since the last call; on a GPU after a synchronisation."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        found = sum(a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in pairs)
        self._marks.clear()
        return float(found)


@dataclass(frozen=True)
class Run:
    """One validation of all sets: seconds, passes, and mean values by set and metric."""

    total: float
    in_network: float
    passes: int
    values: Values

    @property
    def outside(self) -> float:
        return self.total - self.in_network


def prepare(file: str, overrides: Sequence[str], device: Device, folder: Path) -> dict[str, Any]:
    """The options of a test; ``path.pretrain_network_g`` may be missing.

    Raises:
        OptionError: The options are invalid, the model is BasicSR's own, there is no metric, or no such device.
    """
    if device == Device.cuda and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch finds no GPU; omit it to measure the CPU")
    forced = [*overrides, f"num_gpu={int(device == Device.cuda)}"]
    opt, _ = parse_options(str(folder), False, ["-opt", file, "--random-weights", "--force_yml", *forced])
    if not issubclass(registered(MODEL_REGISTRY)[opt["model_type"]], LoopInterface):
        raise OptionError(f"model_type: {opt['model_type']} is BasicSR's own; give KDModel")
    if not (opt.get("val") or {}).get("metrics"):
        raise OptionError("val.metrics: missing; bench validation compares values and times of metrics")
    opt["path"] |= {key: str(folder / "results") for key in ("results_root", "visualization")}
    return opt


def sides(opt: dict[str, Any], save_img: bool) -> dict[str, Callable[[str], Run]]:
    """Functions that run a validation, given a name for it: ``kdsr`` and ``BasicSR``."""
    datasets = opt["datasets"]

    def loaders(make: Callable[[str], Any]) -> list[Any]:
        return [build_dataloader(make(key), datasets[key], opt["num_gpu"], False) for key in datasets]

    ours = build_model(opt)
    own = loaders(lambda key: make_dataset(key, datasets[key], opt["manual_seed"]))
    kind = "SwinIRModel" if opt["network_g"]["type"] == "SwinIR" else "SRModel"  # the former pads
    stock = build_model(
        {**deepcopy(opt), "model_type": kind, "path": {**opt["path"], "pretrain_network_g": None}}
    )
    stock.net_g.load_state_dict(ours.net_g.state_dict())
    stock.net_g.eval()
    others = loaders(lambda key: build_dataset(deepcopy(datasets[key])))

    def side(net: torch.nn.Module, validate: Callable[[str], Values]) -> Callable[[str], Run]:
        passes = PassTimes(net)

        def run(name: str) -> Run:
            passes.images.clear()
            start = time.perf_counter()
            values = validate(name)
            if passes.on_gpu:
                torch.cuda.synchronize()
            total = time.perf_counter() - start
            return Run(total, passes.seconds(), len(passes.images), values)

        return run

    def validate(name: str) -> Values:
        return {
            loader.dataset.opt["name"]: ours.validator.validate(loader, name, None, save_img)
            for loader in own
        }

    def validate_stock(name: str) -> Values:
        values = {}
        for loader in others:
            stock.nondist_validation(loader, name, None, save_img)
            values[loader.dataset.opt["name"]] = {
                key: float(value) for key, value in stock.metric_results.items()
            }
        return values

    return {"kdsr": side(ours.net_g, validate), "BasicSR": side(stock.net_g, validate_stock)}


def _spread(values: Sequence[float], digits: int = 3) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def summary(runs: dict[str, list[Run]]) -> pd.DataFrame:
    """Two rows and their ratio, pair by pair, as text: median and spread."""
    columns = {"total": "total, s", "in_network": "in the network, s", "outside": "outside, s"}
    table = pd.DataFrame(columns=[*columns.values(), "passes"], dtype=object)
    for name, measured in runs.items():
        cells = [_spread([getattr(run, column) for run in measured]) for column in columns]
        table.loc[name] = [*cells, str(measured[-1].passes)]
    pairs = list(zip(*runs.values(), strict=True))
    ratios = [_spread([getattr(a, column) / getattr(b, column) for a, b in pairs], 2) for column in columns]
    table.loc["kdsr ÷ BasicSR"] = [*ratios, ""]
    table.index.name = "median (min–max)"
    return table


def value_table(runs: dict[str, list[Run]]) -> pd.DataFrame:
    """The mean values of both, and their difference, as text."""
    ours, stock = (measured[-1].values for measured in runs.values())
    table = pd.DataFrame(columns=[*runs, "difference"], dtype=object)
    for name in ours:
        for metric, value in ours[name].items():
            other = stock[name][metric]
            table.loc[f"{name}, {metric}"] = [f"{value:.4f}", f"{other:.4f}", f"{value - other:.1e}"]
    table.index.name = "mean"
    return table


def validation(
    opt: Annotated[str, typer.Option("-opt", "--opt", help="Option file of a training or a test.")],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    repeat: Annotated[
        int, typer.Option(min=1, help="Measured pairs of validations, after one for warm-up.")
    ] = 5,
    save_img: Annotated[bool, typer.Option("--save-img", help="Also save the images.")] = False,
    device: Annotated[Device, typer.Option(help="What to measure on.")] = Device.cpu,
    force_yml: Annotated[
        list[str] | None, typer.Option("--force_yml", "--force-yml", help="KEY:KEY=VALUE, as in a test.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all measured values to this file.")
    ] = None,
) -> None:
    """Time of a validation beside BasicSR's own loop, in turn: same network and images.

    Weights are random unless path:pretrain_network_g is given.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = prepare(opt, force_yml or (), device, Path(folder))
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        logging.disable(logging.INFO)
        try:
            both = sides(options, save_img)
            pairs = [{name: run(str(number)) for name, run in both.items()} for number in range(repeat + 1)]
        finally:
            logging.disable(logging.NOTSET)
        runs = {name: [pair[name] for pair in pairs[1:]] for name in both}
    metrics = ", ".join(options["val"]["metrics"])
    line = machine(device, threads)
    typer.echo(
        f"Validation of {options['name']} on {', '.join(each['name'] for each in options['datasets'].values())} "
        f"({metrics}{', images saved' if save_img else ''}), {repeat} pairs in turn after one for warm-up.\n{line}.\n\n"
        f"{as_markdown(summary(runs))}\n{as_markdown(value_table(runs))}"
    )
    if json_file is not None:
        found = {name: [asdict(run) for run in measured] for name, measured in runs.items()}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(
            json.dumps({"machine": line, "opt": opt, "threads": threads, "runs": found}, indent=1)
        )
