"""Trains what ``kdsr distill`` has planned, measures the student, and writes the table of the result."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from kdsr.data.image_files import list_images
from kdsr.deploy.costs import count
from kdsr.deploy.export import ExportSettings, export
from kdsr.deploy.image_pairs import TEACHER_FOLDER, read_bgr
from kdsr.deploy.network_file import OpenedNetwork, open_network
from kdsr.deploy.plan import resolve_device
from kdsr.deploy.student import count as parameters_of
from kdsr.deploy.teacher import restored
from kdsr.deploy.traced import ExportError
from kdsr.models.image_metrics import baseline_name
from kdsr.models.metrics_file import BASELINE, recorded_means
from kdsr.options.files import load
from kdsr.pipeline import seam
from kdsr.pipeline.resume import newest_state
from kdsr.runtime.atomic_files import atomic_write, display_path
from kdsr.runtime.errors import OptionError
from kdsr.tools import bench_options
from kdsr.tools.demo import quiet_log
from kdsr.tools.report import as_markdown
from kdsr.tools.step_pairs import Setting

_STEPS = 3  # measured steps of the estimate
_SIDE = 256  # of the input for which operations are counted
_TIMED = 3  # images that are restored for the time


def _run_folder(options: dict[str, Any]) -> Path:
    return Path(options["path"]["experiments_root"]) / options["name"]


def check(file: Path) -> None:
    """Checks an option file as a training does; raises an ``OptionError`` with all problems."""
    bench_options.prepare(file)


def estimate(file: Path, device: str) -> str:
    """The time of a training, from a few steps with random images, as a sentence."""
    kind = bench_options.Device(device)
    with _silent():
        setting = Setting("distill", str(file), (), kind, torch.get_num_threads())
        side, options = setting.side(), setting.options
        train = options["datasets"]["train"]
        batch, size, scale = train["batch_size_per_gpu"], train["gt_size"], options["scale"]
        images = {
            "lq": torch.rand(batch, 3, size // scale, size // scale),
            "gt": torch.rand(batch, 3, size, size),
        }
        seconds = [side.step(images, iteration) for iteration in range(1, _STEPS + 2)][1:]
    step, iters = statistics.median(seconds), int(options["train"]["total_iter"])
    return (
        f"about {_duration(step * iters)}: {iters} steps of {step:.2f} s, measured on {_STEPS}, without loading and "
        "validation"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _silent() -> Iterator[None]:
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def train(file: Path) -> None:
    """Trains, from the newest state if there is one; a finished run is not trained again."""
    options = load(file)
    folder = _run_folder(options)
    state, _, _ = newest_state(folder / "training_states", folder / "models")
    done = state["iter"] if state else 0
    if done >= int(options["train"]["total_iter"]) and (folder / "models/net_g_latest.pth").is_file():
        return
    with quiet_log():
        seam.train(os.getcwd(), ["-opt", str(file), "--auto_resume"])


def exported(weights: Path, out: Path, echo: Callable[[str], object]) -> list[Path]:
    """Exports a student as ``student.onnx`` and ``student.safetensors``; what cannot be exported is said.

    Both are measured on the validation images of the run. Files that are newer than the weights are kept.
    """
    made = []
    for ending in (".onnx", ".safetensors"):
        file = out / f"student{ending}"
        if file.is_file() and file.stat().st_mtime_ns >= weights.stat().st_mtime_ns:
            made.append(file)
            continue
        try:
            with _silent():
                export(weights, ExportSettings(file), say=lambda line: None)
            made.append(file)
        except (ExportError, OptionError) as error:  # another ending may work
            echo(f"{file.name} was not written: {'; '.join(error.problems)}")
    return made


def report(file: Path, teacher_file: Path, out: Path, echo: Callable[[str], object]) -> None:
    """Exports the student, prints and writes the table of the result, and prints the paths of what there is."""
    options = load(file)
    folder = _run_folder(options)
    weights = folder / "models/net_g_latest.pth"
    device = resolve_device("cpu" if options["num_gpu"] == 0 else "auto")
    with _silent():
        student = open_network(weights, device=device)
        is_spandrels = options["network_t"]["type"] == "Spandrel"
        teacher = open_network(teacher_file, None if is_spandrels else file, device)
    files = exported(weights, out, echo)
    table = _table(options, folder, teacher, student)
    text = as_markdown(table)
    atomic_write(out / "result.md", lambda stream: stream.write(text.encode()))
    has_gt = Path(options["datasets"]["val"]["dataroot_gt"]).name != TEACHER_FOLDER
    echo(f"\n{text}")
    echo(
        f"PSNR (dB) and SSIM: Y channel, mean over the held-out images{'' if has_gt else ', against the teacher'}. "
        f"GFLOP: of a {_SIDE}×{_SIDE} input,\na multiply-add counts as two. Seconds: of a held-out image, median, on "
        f"this machine's {'GPU' if device == 'cuda' else 'CPU'}.\n"
    )
    baseline = baseline_name(options["scale"])
    values = [str(table["PSNR"].get(name, "–")) for name in ("student", baseline)]
    if "–" not in values and float(values[0]) < float(values[1]):
        echo(
            f"Warning: the student is below {baseline}: train it longer (--iters with --force, or another --out).\n"
        )
    for label, path in (
        ("student", weights),
        *(("", path) for path in files),
        ("table", out / "result.md"),
        ("each image", folder / "metrics.csv"),
        ("options", file),
        ("log", folder),
    ):
        echo(f"{label:<11}{display_path(path)}")


def _table(
    options: dict[str, Any], folder: Path, teacher: OpenedNetwork, student: OpenedNetwork
) -> pd.DataFrame:
    scale, iters, csv = options["scale"], int(options["train"]["total_iter"]), folder / "metrics.csv"
    lq = list_images(options["datasets"]["val"]["dataroot_lq"])[:_TIMED]
    table = pd.DataFrame(columns=["parameters", "GFLOP", "PSNR", "SSIM", "seconds"], dtype=object)
    numbers: dict[str, tuple[float, float, float]] = {}
    rows = ((baseline_name(scale), None, (0, BASELINE)), ("teacher", teacher, (0, "teacher")),
            ("student", student, (iters, "student")))  # fmt: skip
    for name, opened, (iteration, who) in rows:
        means = recorded_means(csv, iteration, "val", who)
        quality = [
            f"{means[key]:.{digits}f}" if key in means else "–" for key, digits in (("psnr", 2), ("ssim", 4))
        ]
        if opened is None:
            table.loc[name] = ["–", "–", *quality, "–"]
            continue
        parameters, seconds = parameters_of(opened.net), _seconds(opened.net, lq, scale)
        gflop = count(opened, (_SIDE, _SIDE)).flops / 1e9  # may move the network
        numbers[name] = (parameters, gflop, seconds)
        table.loc[name] = [f"{parameters:,}", f"{gflop:,.1f}", *quality, f"{seconds:.3f}"]
    ratios = [large / small for large, small in zip(numbers["teacher"], numbers["student"], strict=True)]
    table.loc["teacher ÷ student"] = [f"{ratios[0]:.1f}", f"{ratios[1]:.1f}", "", "", f"{ratios[2]:.1f}"]
    table.index.name = f"×{scale}" if scale > 1 else ""
    return table


def _seconds(net: nn.Module, files: list[Path], scale: int) -> float:
    """Median time of an image, after one for warm-up."""
    times = []
    for file in [files[0], *files]:
        image = read_bgr(file)
        start = time.perf_counter()
        restored(net, image, scale)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
