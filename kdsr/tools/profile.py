"""``kdsr profile``: parameters, operations, latency and memory of several networks side by side.

Each network is measured in a process of its own, because a process does not release all of its memory.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from kdsr.deploy.costs import NtireScore, count, fitting, in_onnx, latency
from kdsr.deploy.network_file import Found, OpenedNetwork, build, describe, open_network, read_options
from kdsr.distill.weight_files import each_network
from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.errors import DataError, OptionError
from kdsr.tools.bench_options import Device
from kdsr.tools.machine import machine
from kdsr.tools.report import as_markdown, as_text
from kdsr.tools.step_clock import Memory

USUAL = (256, 256)
_BASELINE_KEYS = ("milliseconds", "gflops", "parameters")


class Format(StrEnum):
    """Formats of the table."""

    text = "text"
    markdown = "markdown"
    csv = "csv"
    json = "json"


@dataclass(frozen=True)
class Subject:
    """A network to measure: that of a file, or ``key`` of an option file, with random weights."""

    name: str
    file: Path | None
    opt: Path | None
    key: str = ""

    def open(self, device: str) -> OpenedNetwork:
        if self.file is not None:
            return open_network(self.file, self.opt, device)
        assert self.opt is not None
        found = Found(each_network(read_options(self.opt))[self.key], f"{self.key} of {self.opt}")
        return describe(build(found), found, self.name, device)


@dataclass(frozen=True)
class Plan:
    """How a network is measured; picklable for a new process."""

    size: tuple[int, int]
    warmup: int
    repeat: int
    threads: int
    device: Device
    onnx: bool

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """A row of the table, by the names of the JSON format; NaN for what is not known."""
        logging.disable(logging.INFO)
        torch.set_num_threads(self.threads)
        opened = subject.open(self.device)
        weights = list(opened.net.parameters())
        row: dict[str, Any] = {
            "network": subject.name,
            "type": (opened.options or {}).get("type", "unknown"),
            "scale": opened.scale,
            "parameters": sum(value.numel() for value in weights) or math.nan,
        }
        for label, size in (("256x256", USUAL), (_shown(self.size), self.size)):
            counts = count(opened, size) if weights else None
            row[f"gflops_{label}"] = counts.flops / 1e9 if counts else math.nan
            row[f"activations_{label}"] = counts.activations if counts else math.nan
        x = torch.rand(1, opened.channels_in, *fitting(self.size, opened), device=str(self.device))
        memory = Memory(x.device)
        memory.start()
        before = memory.peak()
        on_gpu = self.device == Device.cuda and bool(weights)
        took = latency(opened.net, x, warmup=self.warmup, repeat=self.repeat, by_events=on_gpu)
        row |= _milliseconds("milliseconds", took) | {"peak_mib": memory.peak() - before}
        row["file_mib"] = subject.file.stat().st_size / 2**20 if subject.file else math.nan
        if self.onnx and weights:
            exported = in_onnx(opened, self.threads)
            row |= _milliseconds(
                "onnx_milliseconds", latency(exported, x.cpu(), warmup=self.warmup, repeat=self.repeat)
            )
        return row

    def in_new_process(self, subject: Subject) -> dict[str, Any]:
        """The same in a new process.

        Raises:
            DataError: It was killed, for want of memory.
        """
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                return pool.submit(self, subject).result()
            except BrokenProcessPool as error:
                raise DataError(
                    f"{subject.name}: {_shown(self.size)} pixels do not fit into memory"
                ) from error


def _milliseconds(key: str, took: Any) -> dict[str, float]:
    return {key: took.median, f"{key}_min": took.shortest, f"{key}_max": took.longest}


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def subjects_of(files: Sequence[Path], opt: Path | None) -> list[Subject]:
    """Teachers and student of an option file, then the networks of files.

    Raises:
        OptionError: There is nothing to measure.
    """
    found = []
    if opt is not None:
        options = each_network(read_options(opt))
        keys = [key for key in options if key.partition(".")[0] in ("network_t", "network_g")]
        keys = sorted(
            (key for key in keys if isinstance(options[key], dict)), key=lambda key: key == "network_g"
        )
        if not keys:
            raise OptionError(f"{opt}: has neither network_t nor network_g")
        roles = {key: "student" if key == "network_g" else f"teacher{key[9:]}" for key in keys}
        found = [Subject(role, None, opt, key) for key, role in roles.items()]
    stems = [*(one.name for one in found), *(file.stem for file in files)]
    found += [Subject(file.stem if stems.count(file.stem) == 1 else str(file), file, None) for file in files]
    if not found:
        raise OptionError("nothing to measure: give checkpoints, or an option file with -opt FILE")
    return found


def read_baseline(file: Path) -> NtireScore:
    """A baseline of the NTIRE score: the first row of a JSON file of ``kdsr profile --format json``.

    Raises:
        OptionError: It is no such file.
    """
    try:
        row = json.loads(file.read_text(encoding="utf-8"))["networks"][0]
        values = [row["milliseconds"], row["gflops_256x256"], row["parameters"]]
        if not all(isinstance(value, int | float) and value > 0 for value in values):
            raise ValueError(f"{', '.join(_BASELINE_KEYS)} must be above 0")
    except OSError as error:
        raise OptionError(f"--baseline {file}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise OptionError(
            f"--baseline {file}: is no file of kdsr profile --format json ({type(error).__name__}: {error})"
        ) from error
    return NtireScore(*values)


def with_ratios(rows: list[dict[str, Any]], score: NtireScore | None) -> list[dict[str, Any]]:
    """The rows with their ratios to the first one, and with the score against a baseline."""
    first = rows[0]
    for row in rows:
        row["parameters_ratio"] = first["parameters"] / row["parameters"]
        row["flops_ratio"] = first["gflops_256x256"] / row["gflops_256x256"]
        row["speed_ratio"] = first["milliseconds"] / row["milliseconds"]
        if score is not None:
            row["ntire_score"] = score(row["milliseconds"], row["gflops_256x256"], row["parameters"])
    return rows


def table(rows: list[dict[str, Any]], size: tuple[int, int], ntire: bool) -> pd.DataFrame:
    """The rows as text; under ``ntire`` with the columns of the challenge, whose FLOPs are multiply-adds."""
    label = _shown(size)
    lines = []
    for row in rows:
        cells = {
            "type": row["type"],
            "scale": f"×{row['scale']}",
            "parameters": _number(row["parameters"], 0),
            "GFLOPs 256x256": _number(row["gflops_256x256"], 2),
            "activations (M)": _number(row["activations_256x256"] / 1e6, 2),
        }
        if size != USUAL:
            cells |= {
                f"GFLOPs {label}": _number(row[f"gflops_{label}"], 2),
                f"activations (M) {label}": _number(row[f"activations_{label}"] / 1e6, 2),
            }
        cells["ms"] = _spread(row, "milliseconds")
        if any("onnx_milliseconds" in one for one in rows):
            cells["ms in onnxruntime"] = _spread(row, "onnx_milliseconds")
        cells |= {"peak MiB": _number(row["peak_mib"], 0), "file MiB": _number(row["file_mib"], 2)}
        cells["smaller / fewer FLOPs / faster"] = " / ".join(
            f"{_number(row[f'{key}_ratio'], 2)}×" for key in ("parameters", "flops", "speed")
        )
        if ntire:
            cells |= {
                "Params [M]": _number(row["parameters"] / 1e6, 3),
                "FLOPs [G]": _number(row["gflops_256x256"] / 2, 2),
                "Acts [M]": _number(row["activations_256x256"] / 1e6, 2),
                "Runtime [ms]": _number(row["milliseconds"], 2),
                "Mem [M]": _number(row["peak_mib"], 1),
            }
        if "ntire_score" in row:
            cells["score"] = _number(row["ntire_score"], 2)
        lines.append(cells)
    shown = pd.DataFrame(lines, index=[row["network"] for row in rows])
    shown.index.name = "network"
    return shown


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def _spread(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "–"
    return f"{row[key]:,.1f} ({row[f'{key}_min']:,.1f}–{row[f'{key}_max']:,.1f})"


def written(
    rows: list[dict[str, Any]], notes: dict[str, Any], size: tuple[int, int], ntire: bool, kind: Format
) -> str:
    """The table in a format."""
    if kind == Format.csv:
        return pd.DataFrame(rows).to_csv(index=False)
    if kind == Format.json:
        known = [{key: value for key, value in row.items() if value == value} for row in rows]  # without NaN
        return json.dumps({**notes, "networks": known}, indent=1, ensure_ascii=False) + "\n"
    shown = table(rows, size, ntire)
    head = "\n".join(f"{key}: {value}" for key, value in notes.items())
    return f"{head}\n\n" + (as_markdown(shown) if kind == Format.markdown else as_text(shown, below=0) + "\n")


def profile(
    checkpoints: Annotated[
        list[Path] | None, typer.Argument(metavar="CHECKPOINT...", help="Checkpoints or .onnx files.")
    ] = None,
    opt: Annotated[
        Path | None,
        typer.Option("-opt", "--opt", help="Option file: its teachers and its student, with random weights."),
    ] = None,
    size: Annotated[
        str, typer.Option(metavar="HxW", help="Size of the input for latency and memory.")
    ] = "256x256",
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also the latency in onnxruntime, on the CPU.")
    ] = False,
    ntire: Annotated[
        bool, typer.Option("--ntire", help="Columns of the NTIRE challenge on efficient super-resolution.")
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option(help="JSON of an earlier profile; its first network is the baseline of NTIRE's score."),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Passes before the measurement.")] = 3,
    repeat: Annotated[int, typer.Option(min=1, help="Measured passes.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    device: Annotated[Device, typer.Option(help="What to measure on.")] = Device.cpu,
    format: Annotated[Format, typer.Option(help="Of the table.")] = Format.text,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File to write the table to as well.")
    ] = None,
) -> None:
    """Parameters, operations, latency and memory of networks side by side; ratios are to the first one."""
    height, _, width = size.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise OptionError(f"--size: {size!r} is not a size; give HEIGHTxWIDTH in pixels, such as 256x256")
    if device == Device.cuda and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch finds no GPU; omit it to measure the CPU")
    score = read_baseline(baseline) if baseline else None
    plan = Plan((int(height), int(width)), warmup, repeat, threads, device, onnx)
    rows = with_ratios(
        [plan.in_new_process(subject) for subject in subjects_of(checkpoints or (), opt)], score
    )
    notes = {
        "machine": machine(device, threads),
        "latency": f"median (shortest–longest) of {repeat} passes over a {_shown(plan.size)} image after {warmup}, "
        + ("CUDA events" if device == Device.cuda else f"{threads} CPU threads"),
        "operations": "FLOPs count a multiplication and an addition as two, NTIRE's as one; "
        "activations are the outputs of convolutions",
    }
    text = written(rows, notes, plan.size, ntire or score is not None, format)
    if out is not None:
        atomic_write(out, lambda file: file.write(text.encode()))
    typer.echo(text, nl=False)
