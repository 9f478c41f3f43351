"""``kdsr bench step --vs``: two settings of a training step, compared pair by pair in one process."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from typing import Any

import pandas as pd
import torch
from basicsr.models import build_model
from basicsr.utils import set_random_seed
from torch import Tensor

from kdsr.runtime.errors import OptionError
from kdsr.runtime.memory import keep_freed_memory
from kdsr.tools import plain_step, srmodel_step
from kdsr.tools.bench_options import Device, prepare
from kdsr.tools.step_clock import Memory, mib, now

# by the word after --vs: the step, and why it cannot be made of an option file
BASELINES: dict[str, tuple[Callable[[Any], Any], Callable[[dict[str, Any]], str | None]]] = {
    "plain": (plain_step.PlainStep, plain_step.problem),
    "srmodel": (srmodel_step.SRModelStep, srmodel_step.problem),
}
QUARTILES = (0.25, 0.75)


@dataclass(frozen=True)
class Setting:
    """One side of a comparison, picklable for a new process."""

    name: str
    file: str
    overrides: tuple[str, ...]
    device: Device
    threads: int

    def versus(self, values: Sequence[str]) -> Setting:
        """The other side: this one with further ``KEY:KEY=VALUE``, or a baseline.

        Raises:
            OptionError: A value is neither, or there is no baseline for the option file.
        """
        if len(values) == 1 and values[0] in BASELINES:
            if found := BASELINES[values[0]][1](self.options):
                raise OptionError(f"--vs {values[0]}: {self.file}: {found}")
            return replace(self, name=values[0])
        if wrong := [value for value in values if "=" not in value]:
            words = " or ".join(BASELINES)
            raise OptionError(f"--vs: {wrong[0]!r}: give KEY:KEY=VALUE, once or more, or only {words}")
        return replace(self, name=" ".join(values), overrides=(*self.overrides, *values))

    @cached_property
    def options(self) -> dict[str, Any]:
        opt = prepare(self.file, self.overrides, self.device)
        if self.name in BASELINES:  # neither what makes the step faster, nor what makes it smaller
            opt = {**opt, "precision": None, "train": opt["train"] | {"checkpoint_student": False}}
        return opt

    def side(self) -> Side:
        """Builds the model; the same seed gives both settings the same weights."""
        set_random_seed(self.options.get("manual_seed") or 0)
        return Side(build_model(self.options), self.name)

    def peak(self, batch: dict[str, Tensor]) -> float:
        """Peak memory in MiB of three steps in this process, which has run nothing before; NaN if unknown."""
        logging.disable(logging.INFO)
        torch.set_num_threads(self.threads)
        side = self.side()
        memory = Memory(side.model.device)
        memory.start()
        for iteration in range(1, 4):  # the allocator's peak comes after the first
            side.step(batch, iteration)
        return memory.peak()

    def peak_in_new_process(self, batch: dict[str, Tensor]) -> float:
        # a copy without the options: reading them there imports the user's modules
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(replace(self).peak, batch).result()


class Side:
    """A model in training, or the baseline with its networks, and the settings of torch that it wants."""

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.baseline = name in BASELINES
        self.steps = BASELINES[name][0](model) if self.baseline else model
        self.cudnn_benchmark = self.baseline or torch.backends.cudnn.benchmark
        self.deterministic = torch.are_deterministic_algorithms_enabled()

    def step(self, batch: dict[str, Tensor], iteration: int) -> float:
        """Runs a training step; returns seconds."""
        keep_freed_memory(not self.baseline)
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.use_deterministic_algorithms(self.deterministic)
        set_random_seed(iteration)  # stochastic depth draws from the global generator
        start = now(self.model.device)
        self.steps.feed_data(batch)
        self.steps.optimize_parameters(iteration)
        return now(self.model.device) - start

    def losses(self) -> dict[str, float]:
        return {name: float(loss) for name, loss in self.steps.log_dict.items()}


@dataclass(frozen=True)
class Comparison:
    """Seconds of both settings by pair, peak memory in MiB, and the losses of the first step by name."""

    names: tuple[str, str]
    seconds: list[tuple[float, float]]
    peaks: tuple[float, float]
    losses: dict[str, tuple[float, float]]

    @property
    def ratios(self) -> list[float]:
        """Seconds of the second setting by those of the first."""
        return [second / first for first, second in self.seconds]

    def table(self) -> pd.DataFrame:
        """The report as text: a row per setting, and the ratio of the second to the first."""
        table = pd.DataFrame(columns=["median s", "quartiles s", "min–max s", "peak MiB"], dtype=object)
        for index, name in enumerate(self.names):
            table.loc[name] = [*spread([pair[index] for pair in self.seconds]), mib(self.peaks[index])]
        peak = self.peaks[1] / self.peaks[0]
        table.loc["second ÷ first, pair by pair"] = [
            *spread(self.ratios),
            "–" if math.isnan(peak) else f"{peak:.3f}",
        ]
        table.index.name = f"setting, {len(self.seconds)} pairs"
        return table

    def loss_table(self) -> pd.DataFrame:
        """The losses of the first step, with the same weights, batch and random numbers."""
        table = pd.DataFrame(columns=["first", "second", "relative difference"], dtype=object)
        for name, (first, second) in self.losses.items():
            table.loc[name] = [f"{first:.6g}", f"{second:.6g}", f"{relative(first, second):.1e}"]
        table.index.name = "loss of the first step"
        return table

    def as_json(self) -> dict[str, Any]:
        low, high = quartiles(self.ratios)
        ratio = {"median": median(self.ratios), "quartiles": [low, high], "each": self.ratios}
        losses = {
            name: {"values": values, "relative_difference": relative(*values)}
            for name, values in self.losses.items()
        }
        peaks = [None if math.isnan(peak) else peak for peak in self.peaks]
        return {
            "settings": self.names, "seconds": self.seconds, "ratio": ratio, "peak_mib": peaks, "first_losses": losses,
        }  # fmt: skip


def median(values: Sequence[float]) -> float:
    return float(pd.Series(values).median())


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = pd.Series(values).quantile(QUARTILES)
    return float(low), float(high)


def spread(values: Sequence[float]) -> list[str]:
    """Median, quartiles and range as text."""
    low, high = quartiles(values)
    return [f"{median(values):.3f}", f"{low:.3f}–{high:.3f}", f"{min(values):.3f}–{max(values):.3f}"]


def relative(first: float, second: float) -> float:
    return abs(second - first) / max(abs(first), 1e-12)


def compare(
    settings: tuple[Setting, Setting], batch: dict[str, Tensor], *, warmup: int, pairs: int
) -> Comparison:
    """Runs both settings step by step in alternating order, after each alone in a new process for its peak memory."""
    peaks = [setting.peak_in_new_process(batch) for setting in settings]
    sides = [setting.side() for setting in settings]
    first_losses: list[dict[str, float]] = []
    seconds: list[tuple[float, float]] = []
    for index in range(max(warmup, 1) + pairs):
        pair = [0.0, 0.0]
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            pair[which] = sides[which].step(batch, index + 1)
        if index == 0:
            first_losses = [side.losses() for side in sides]
        if index >= max(warmup, 1):
            seconds.append((pair[0], pair[1]))
    first, second = first_losses
    losses = {name: (first[name], second[name]) for name in first if name in second}
    return Comparison((settings[0].name, settings[1].name), seconds, (peaks[0], peaks[1]), losses)
