"""``kdsr demo``: a student distilled by DCKD next to the same student without a teacher, on real photographs.

Both are trained by the project's own pipeline from the option files ``options/train/demo_*``, for the same
iterations on the same data in the same order; then bicubic interpolation, both students and the teacher are
measured on photographs that no training has seen. What is reported is what was measured, whoever wins.
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

from kdsr.data.resize import imresize
from kdsr.pipeline import seam
from kdsr.pipeline.options import load
from kdsr.runtime.checkpoint import load_weights
from kdsr.runtime.errors import CheckpointError, OptionError
from kdsr.tools import crops, report
from kdsr.tools.report import Image, Method
from kdsr.tools.sample import make_sample

ROOT = Path(__file__).resolve().parents[2]
BICUBIC, SCRATCH, DCKD, TEACHER = "bicubic", "no teacher", "DCKD", "teacher"
FILES = {
    SCRATCH: ROOT / "options/train/demo_Scratch_EDSR_x4.yml",
    DCKD: ROOT / "options/train/demo_DCKD_EDSR_x4.yml",
}
SAMPLE = Path("datasets/sample")
SAMPLE_SCALES = (2, 3, 4)
_STEPS = 4


@dataclass(frozen=True)
class Run:
    """A finished training: its option file, its folder and how long it took."""

    options: dict[str, Any]
    folder: Path
    seconds: float

    @property
    def weights(self) -> Path:
        return self.folder / "models" / "net_g_latest.pth"


def shipped_weights(options: Mapping[str, Any], network: str) -> Path:
    """The file of a frozen network: relative to the working directory as in any run, else the checkout's.

    Raises:
        CheckpointError: It is in neither place.
    """
    option = f"pretrain_network_{network}"
    file = Path(options["path"][option])
    for path in (file, ROOT / file):
        if path.is_file():
            return path
    raise CheckpointError(f"path.{option}: there is no file {file}, neither here nor in {ROOT}")


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Keeps BasicSR's log lines off a terminal, where the progress line is; the log file gets them all."""
    if not sys.stderr.isatty():
        yield
        return
    logger = logging.getLogger("basicsr")

    def hush(_: logging.LogRecord) -> bool:
        # the console handler is made anew by each run, so it is looked for at each record
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.WARNING)
        return True

    logger.addFilter(hush)
    try:
        yield
    finally:
        logger.removeFilter(hush)


def train(file: Path, out: Path, iters: int | None) -> Run:
    """Trains what an option file describes, below ``out``."""
    options = load(file)
    overrides = [f"path:experiments_root={json.dumps(str(out))}"]
    if iters is not None:
        overrides.append(f"train:total_iter={iters}")
    for key in ("t", "vqgan"):
        if options.get(f"network_{key}"):
            weights = shipped_weights(options, key)
            overrides.append(f"path:pretrain_network_{key}={json.dumps(str(weights))}")
    started = time.monotonic()
    with _quiet_log():
        seam.train(os.getcwd(), ["-opt", str(file), "--force_yml", *overrides])
    return Run(options, out / options["name"], time.monotonic() - started)


def network(options: Mapping[str, Any], key: str, weights: Path) -> torch.nn.Module:
    """``network_<key>`` of the options with the weights that a test would take (the EMA where there is one)."""
    net = build_network(dict(options[f"network_{key}"])).eval()
    load_weights(net, weights, param_key="auto", option=f"path.pretrain_network_{key}")
    return net


@torch.no_grad()
def restore(net: torch.nn.Module, lq: Image) -> Image:
    """What a network makes of an 8-bit RGB image."""
    output = net(img2tensor(lq / np.float32(255), bgr2rgb=False)[None])
    return np.asarray(tensor2img([output], rgb2bgr=False))


def validation_pairs(options: Mapping[str, Any]) -> tuple[dict[str, Image], dict[str, Image]]:
    """The validation photographs of the options and their LQ images, by name."""
    folders = (Path(options["datasets"]["val"][key]) for key in ("dataroot_gt", "dataroot_lq"))
    gt, lq = ({path.stem: report.load_rgb(path) for path in sorted(folder.iterdir())} for folder in folders)
    return gt, lq


def verdict(scores: pd.DataFrame, iters: int) -> str:
    """What the comparison of the two students came to, in words that claim no more than was measured."""
    (psnr, ssim), (psnr_alone, ssim_alone) = (report.mean_scores(scores, name) for name in (DCKD, SCRATCH))
    each = scores[scores["image"] != report.MEAN].pivot(index="image", columns="method", values="psnr")
    better = int((each[DCKD] > each[SCRATCH]).sum())
    gain = psnr - psnr_alone
    says = "ahead of" if gain > 0 else "behind"
    if abs(gain) < 0.005:
        says = "level with"
    return (
        f"After {iters} iterations the DCKD student is {says} the one without a teacher: {gain:+.2f} dB PSNR, "
        f"{ssim - ssim_alone:+.4f} SSIM on average, more PSNR on {better} of {len(each)} photographs. One seed "
        "and a few minutes: docs/benchmarks.md says how far such a difference can be trusted."
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


def run_demo(out: Path, iters: int | None, say: Callable[[str], None]) -> pd.DataFrame:
    """Sample data, two trainings, the comparison.

    Args:
        out: Gets the runs' folders, the table, the picture and the restored photographs.
        iters: Iterations of each training; those of the option files when None.
        say: Called with each line for the user.

    Returns:
        The scores, as ``report.score`` returns them.
    """
    missing = [str(file) for file in FILES.values() if not file.is_file()]
    if missing:
        raise OptionError(f"{missing[0]}: not there; kdsr demo runs from a checkout of the project")
    options = load(FILES[DCKD])
    teacher_file = shipped_weights(options, "t")
    shipped_weights(options, "vqgan")

    say(f"[1/{_STEPS}] sample photographs in {SAMPLE}")
    make_sample(SAMPLE, SAMPLE_SCALES)
    runs: dict[str, Run] = {}
    for step, (name, what) in enumerate(
        ((SCRATCH, "without a teacher"), (DCKD, "distilled by DCKD")), start=2
    ):
        say(f"[{step}/{_STEPS}] training the student {what}: {FILES[name].relative_to(ROOT)}")
        runs[name] = train(FILES[name], out, iters)
        say(f"      {runs[name].seconds:.0f} s")

    say(f"[{_STEPS}/{_STEPS}] measuring on the held-out photographs")
    gt, lq = validation_pairs(options)
    scale = options["scale"]
    with _quiet_log():
        nets = {name: network(run.options, "g", run.weights) for name, run in runs.items()}
        nets[TEACHER] = network(options, "t", teacher_file)
    methods = [Method(BICUBIC, {name: imresize(image, scale) for name, image in lq.items()})]
    for name, net in nets.items():
        parameters = sum(parameter.numel() for parameter in net.parameters())
        restored = {photo: restore(net, image) for photo, image in lq.items()}
        methods.append(Method(name, restored, parameters, competes=name != TEACHER))
    scores = report.score(gt, methods, border=scale)

    done = iters or int(options["train"]["total_iter"])
    table_csv, table_md = report.write_table(scores, out)
    figure = crops.draw(
        gt,
        methods,
        scores,
        title=f"×{scale} super-resolution after {done} iterations: one student, with and without DCKD",
        caption="Crops of 64×64 pixels, where the methods differ most. Below each: PSNR (dB) / SSIM of the whole "
        f"photograph, Y channel, border {scale}; bold: the best PSNR but for the teacher's.",
        border=scale,
    )
    picture = crops.write_picture(figure, out / "comparison.png")
    images = write_images(out, gt, methods)

    say("")
    say(report.as_text(report.comparison(scores)))
    say("")
    say(textwrap.fill(verdict(scores, done), 100))
    say("")
    for label, path in (
        ("picture", picture),
        ("table", table_md),
        ("all values", table_csv),
        ("restored images", images),
        ("student, DCKD", runs[DCKD].weights),
        ("student, no teacher", runs[SCRATCH].weights),
        ("options, logs", runs[DCKD].folder),
        ("", runs[SCRATCH].folder),
    ):
        say(f"{label:<21}{path}")
    return scores


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the runs and the report.")] = Path("experiments/demo"),
    iters: Annotated[int | None, typer.Option(min=1, help="Iterations of each training.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
) -> None:
    """Distil a small student by DCKD on sample photographs and compare: about five minutes on two CPU cores."""
    if threads is not None:
        torch.set_num_threads(threads)
    run_demo(out, iters, lambda line: typer.echo(line))
