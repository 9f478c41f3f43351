"""``kdsr demo``: compares a distilled student with the same student without a teacher, on real photographs.

Both are trained from the option files ``options/train/demo_*`` with the same iterations, data and order. Then both
students, the teacher and the image without a network are measured on held-out photographs. The tasks are in
:mod:`kdsr.tools.demo_tasks`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import pandas as pd
import torch
import typer
from basicsr.archs import build_network
from basicsr.utils import img2tensor, tensor2img

from kdsr.options.files import load
from kdsr.pipeline import seam
from kdsr.runtime.checkpoint import load_weights
from kdsr.runtime.errors import CheckpointError, OptionError
from kdsr.runtime.suggestions import nearest
from kdsr.tools import crops, report
from kdsr.tools.demo_tasks import ROOT, SCRATCH, TASKS, TEACHER, Task
from kdsr.tools.report import Image, Method

_STEPS = 4
_FROZEN = "pretrain_network_"


@dataclass(frozen=True)
class Run:
    """A finished training: options, folder and duration."""

    options: dict[str, Any]
    folder: Path
    seconds: float

    @property
    def weights(self) -> Path:
        return self.folder / "models" / "net_g_latest.pth"


def shipped_weights(options: Mapping[str, Any], network: str) -> Path:
    """The weight file of a frozen network, relative to the working directory or else the checkout.

    Raises:
        CheckpointError: It is in neither.
    """
    option = f"{_FROZEN}{network}"
    file = Path(options["path"][option])
    for path in (file, ROOT / file):
        if path.is_file():
            return path
    raise CheckpointError(f"path.{option}: there is no file {file}, neither here nor in {ROOT}")


def frozen_networks(options: Mapping[str, Any]) -> list[str]:
    """Names of the networks that need weights: ``t``, ``vqgan``, …"""
    return [
        key.removeprefix(_FROZEN) for key, file in options["path"].items() if key.startswith(_FROZEN) and file
    ]


@contextmanager
def quiet_log() -> Iterator[None]:
    """Hides BasicSR's log lines on a terminal, where the progress bar is; the log file gets them all."""
    if not sys.stderr.isatty():
        yield
        return
    logger = logging.getLogger("basicsr")

    def filter_console(_: logging.LogRecord) -> bool:
        # each run creates a new console handler
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.WARNING)
        return True

    logger.addFilter(filter_console)
    try:
        yield
    finally:
        logger.removeFilter(filter_console)


def train(file: Path, out: Path, iters: int | None) -> Run:
    """Trains with an option file, below ``out``."""
    options = load(file)
    overrides = [f"path:experiments_root={json.dumps(str(out))}"]
    if iters is not None:
        overrides.append(f"train:total_iter={iters}")
    for key in frozen_networks(options):
        overrides.append(f"path:{_FROZEN}{key}={json.dumps(str(shipped_weights(options, key)))}")
    started = time.monotonic()
    with quiet_log():
        seam.train(os.getcwd(), ["-opt", str(file), "--force_yml", *overrides])
    return Run(options, out / options["name"], time.monotonic() - started)


def network(options: Mapping[str, Any], key: str, weights: Path) -> torch.nn.Module:
    """``network_<key>`` with the weights that a test uses (the EMA if there is one)."""
    net = build_network(dict(options[f"network_{key}"])).eval()
    load_weights(net, weights, param_key="auto", option=f"path.pretrain_network_{key}")
    return net


@torch.no_grad()
def restore(net: torch.nn.Module, lq: Image) -> Image:
    """Restores an 8-bit RGB image."""
    output = net(img2tensor(lq / np.float32(255), bgr2rgb=False)[None])
    return np.asarray(tensor2img([output], rgb2bgr=False))


def validation_pairs(options: Mapping[str, Any]) -> tuple[dict[str, Image], dict[str, Image]]:
    """The validation photographs of the options and their LQ images, by name."""
    folders = (Path(options["datasets"]["val"][key]) for key in ("dataroot_gt", "dataroot_lq"))
    gt, lq = ({path.stem: report.load_rgb(path) for path in sorted(folder.iterdir())} for folder in folders)
    return gt, lq


def verdict(scores: pd.DataFrame, method: str, iters: int) -> str:
    """The result of the comparison of the two students as text."""
    (psnr, ssim), (psnr_alone, ssim_alone) = (report.mean_scores(scores, name) for name in (method, SCRATCH))
    each = scores[scores["image"] != report.MEAN].pivot(index="image", columns="method", values="psnr")
    better = int((each[method] > each[SCRATCH]).sum())
    gain = psnr - psnr_alone
    relation = "level with" if abs(gain) < 0.005 else "ahead of" if gain > 0 else "behind"
    return (
        f"After {iters} iterations the {method} student is {relation} the one without a teacher: {gain:+.2f} dB PSNR, "
        f"{ssim - ssim_alone:+.4f} SSIM on average, more PSNR on {better} of {len(each)} photographs. One seed "
        "and a few minutes: see docs/benchmarks.md for the reliability of such a difference."
    )


def write_images(out: Path, gt: Mapping[str, Image], methods: list[Method]) -> Path:
    """Writes every restored photograph as PNG into ``out/images``."""
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for method in methods:
        for name in gt:
            file = folder / f"{name}_{method.name.replace(' ', '_')}.png"
            cv2.imwrite(str(file), method.images[name][..., ::-1])
    return folder


def run_demo(task: Task, out: Path, iters: int | None, echo: Callable[[str], None]) -> pd.DataFrame:
    """Makes sample data, trains twice and compares; returns the scores of ``report.score``.

    ``out`` gets the runs, the table, the picture and the restored photographs. ``iters`` are the iterations of each
    training, None for the option files' numbers. ``echo`` is called with each line for the user.
    """
    missing = [str(file) for file in task.files.values() if not file.is_file()]
    if missing:
        raise OptionError(f"{missing[0]}: no such file; kdsr demo needs a checkout of the project")
    options = load(task.files[task.method])
    for key in frozen_networks(options):
        shipped_weights(options, key)

    echo(f"[1/{_STEPS}] {task.data}")
    task.prepare()
    runs: dict[str, Run] = {}
    trainings = {SCRATCH: "without a teacher", task.method: f"distilled by {task.method}"}
    for step, (name, what) in enumerate(trainings.items(), start=2):
        echo(f"[{step}/{_STEPS}] training the student {what}: {task.files[name].relative_to(ROOT)}")
        runs[name] = train(task.files[name], out, iters)
        echo(f"      {runs[name].seconds:.0f} s")

    echo(f"[{_STEPS}/{_STEPS}] measuring on the held-out photographs")
    gt, methods = restored_by_all(task, options, runs)
    border = int(options["val"]["metrics"]["psnr"]["crop_border"])  # as in the trainings
    scores = report.score(gt, methods, border=border)

    done = iters or int(options["train"]["total_iter"])
    table_csv, table_md = report.write_table(scores, out)
    figure = crops.draw(
        gt,
        methods,
        scores,
        title=f"{task.title} after {done} iterations: one student, with and without {task.method}",
        caption="Crops of 64×64 pixels, where the methods differ most. Below each: PSNR (dB) / SSIM of the whole "
        f"photograph, Y channel, border {border}; bold: the best PSNR except the teacher's.",
        border=border,
    )
    picture = crops.write_picture(figure, out / "comparison.png")
    images = write_images(out, gt, methods)

    echo(f"\n{report.as_text(report.comparison(scores))}")
    echo(f"\n{textwrap.fill(verdict(scores, task.method, done), 100)}\n")
    for label, path in (
        ("picture", picture),
        ("table", table_md),
        ("all values", table_csv),
        ("restored images", images),
        (f"student, {task.method}", runs[task.method].weights),
        ("student, no teacher", runs[SCRATCH].weights),
        ("options, logs", runs[task.method].folder),
        ("", runs[SCRATCH].folder),
    ):
        echo(f"{label:<21}{path}")
    return scores


def restored_by_all(
    task: Task, options: Mapping[str, Any], runs: Mapping[str, Run]
) -> tuple[dict[str, Image], list[Method]]:
    """The held-out photographs and each method's results; ``options`` are the distillation's."""
    gt, lq = validation_pairs(options)
    with quiet_log():
        nets = {name: network(run.options, "g", run.weights) for name, run in runs.items()}
        nets[TEACHER] = network(options, "t", shipped_weights(options, "t"))
    baseline = {name: task.without_network(image, options["scale"]) for name, image in lq.items()}
    methods = [Method(task.baseline, baseline)]
    for name, net in nets.items():
        parameters = sum(parameter.numel() for parameter in net.parameters())
        restored = {photo: restore(net, image) for photo, image in lq.items()}
        methods.append(Method(name, restored, parameters, competes=name != TEACHER))
    return gt, methods


def demo(
    task: Annotated[
        str, typer.Option(help="sr: ×4 super-resolution by DCKD; rain: deraining by SLKD.")
    ] = "sr",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the runs and the report; experiments/demo or demo_rain by default."),
    ] = None,
    iters: Annotated[int | None, typer.Option(min=1, help="Iterations of each training.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
) -> None:
    """Distil a small student on sample photographs and compare, in about five minutes on two CPU cores."""
    if task not in TASKS:
        raise OptionError(f"--task {task!r}: {nearest(task, TASKS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    run_demo(TASKS[task], out or TASKS[task].out, iters, typer.echo)
