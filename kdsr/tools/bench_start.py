"""``kdsr bench start``: time of a training from the command to its first iteration.

Weights and images are random, written to a temporary folder: neither data nor checkpoints are needed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
import yaml
from basicsr.archs import build_network

from kdsr.runtime.errors import TrainingError
from kdsr.tools.bench_options import Device, read

_STARTED = "Start training from epoch"  # a line of BasicSR's log
_IMAGES = {"train": (32, 480), "val": (10, 128)}  # number of images and side of the ground truth per set


def write_inputs(opt: dict[str, Any], paths: dict[str, Any], folder: Path) -> None:
    """Writes random checkpoints and images into a folder, and an option file ``run.yml`` with their paths."""
    opt["path"] = paths
    for key in [key for key in paths if key.startswith("pretrain_network_")]:
        name = key.removeprefix("pretrain_network_")
        key_in_file = paths.get(f"param_key_{name}", "params")
        weights = build_network(opt[f"network_{name}"]).state_dict()
        paths[key] = str(folder / f"{name}.pth")
        torch.save(
            weights if key_in_file is None else {key_in_file.replace("auto", "params"): weights}, paths[key]
        )
    draw = np.random.default_rng(0)
    for name, options in [(name, each) for name, each in opt["datasets"].items() if each]:
        number, side = _IMAGES[name.split("_")[0]]
        for key in [key for key in ("dataroot_gt", "dataroot_lq") if options.get(key)]:
            size = side // (opt.get("scale") or 1) if key == "dataroot_lq" else side
            options[key] = str(folder / name / key)
            Path(options[key]).mkdir(parents=True)
            for index in range(number):
                image = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
                cv2.imwrite(f"{options[key]}/{index:03d}.png", image)
    (folder / "run.yml").write_text(yaml.safe_dump(opt), encoding="utf-8")


def start_once(python: str, folder: Path) -> tuple[float, float, float]:
    """Returns seconds, CPU seconds and peak memory in MiB until the first iteration begins.

    Raises:
        TrainingError: The training ends before that.
    """
    command = [python, "-m", "kdsr.train", "-opt", "run.yml"]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        command += ["--force_yml", f"path:experiments_root={runs}", "logger:use_tb_logger=false"]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if _STARTED in line:
                    seconds = time.perf_counter() - begin
                    state = Path(f"/proc/{process.pid}")
                    ticks = (state / "stat").read_text().rpartition(")")[2].split()[11:15]
                    peak = int((state / "status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
                    process.kill()
                    return seconds, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), peak
    raise TrainingError(f"the training ended before its first iteration:\n{''.join(lines[-5:])}")


def start(
    opt: Annotated[str, typer.Option("-opt", "--opt", help="Option file of a training run.")],
    repeat: Annotated[int, typer.Option(min=1, help="Number of starts of each installation, in turn.")] = 3,
    force_yml: Annotated[
        list[str] | None, typer.Option("--force_yml", "--force-yml", help="KEY:KEY=VALUE, as in training.")
    ] = None,
    python: Annotated[
        list[str] | None, typer.Option(help="Python of another installation, for comparison.")
    ] = None,
) -> None:
    """Time from the command to the first iteration: random weights and images, no data needed (Linux)."""
    from kdsr.options.files import load

    paths = dict(load(opt, force_yml or []).get("path") or {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(read(opt, force_yml or [], Device.cpu), paths, folder)
        installations = [sys.executable, *(python or [])]
        measured: dict[str, list[tuple[float, float, float]]] = {each: [] for each in installations}
        for _ in range(repeat):
            for each in installations:
                measured[each].append(start_once(each, folder))
    for each, runs in measured.items():
        typer.echo(each)
        for what, values in zip(("s", "CPU s", "peak MiB"), zip(*runs, strict=True), strict=True):
            typer.echo(f"  {what}: median {statistics.median(values):.1f}, min {min(values):.1f}")
