"""``kdsr bench step``: time and memory of the parts of a training step.

The step is the model's ``optimize_parameters``. Hooks on its networks switch between the parts, so that their times add
up to that of the step. Weights and images are random: neither data nor checkpoints are needed.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from basicsr.models import build_model
from basicsr.utils import set_random_seed
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor

from kdsr.distill.step import Step
from kdsr.models.kd_model import KDModel
from kdsr.options.authors import translate
from kdsr.options.check import check
from kdsr.options.check_geometry import check_geometry
from kdsr.options.files import load
from kdsr.options.user_modules import import_user_modules
from kdsr.runtime.errors import OptionError
from kdsr.tools.report import as_markdown
from kdsr.tools.step_clock import REST, Clock, Memory

STUDENT = "student, forward and backward"
TEACHER = "teacher"
WITH_GRADIENT = "{} with gradient, forward and backward"
ADAPTERS = "adapters; backward pass of the feature losses"


class Device(StrEnum):
    """The device of the measurement."""

    cpu = "cpu"
    cuda = "cuda"


@contextmanager
def watched(model: Any, clock: Clock) -> Iterator[None]:
    """Connects ``clock`` to the networks, the backward pass and the optimizer of a model by hooks."""
    handles = []
    with_gradient: list[str] = []  # frozen networks in the backward pass

    def watch(net: torch.nn.Module, label: str, frozen: bool = False) -> None:
        stack: list[str] = []

        def begin(*_: Any) -> None:
            part = label
            if frozen and torch.is_grad_enabled():
                part = WITH_GRADIENT.format(label)
                with_gradient.append(part)
            stack.append(clock.switch(part))

        handles.append(net.register_forward_pre_hook(begin))
        handles.append(net.register_forward_hook(lambda *_: clock.switch(stack.pop()) and None))

    watch(model.net_g, STUDENT)
    for key, teacher in model.teachers.items():
        watch(teacher.net, TEACHER if key == "t" else f"{TEACHER} {key.removeprefix('t').upper()}")
    frozen_networks = {
        net: term.LABELS.get(name, name)
        for term in model.terms.values()
        for name, net in term.networks().items()
    }
    for net, label in frozen_networks.items():
        watch(net, label, frozen=True)
    feature_losses = [term.loss for term in model.terms.values() if term.tap_groups()]
    for loss in feature_losses:
        watch(
            loss, f"{type(loss).__name__} (feature loss)"
        )  # SLKD's losses compute their gradient in the forward pass
    for group in model.student_bundle.adapters.values() if feature_losses else ():
        for adapter in group:
            watch(adapter, ADAPTERS)

    compute_losses = model.compute_losses

    def compute_losses_then_backward(step: Step) -> dict[str, Tensor]:
        # The backward pass starts with the losses and frozen networks. The student's part starts when the gradient of
        # its output is complete.
        with_gradient.clear()
        model.output.register_hook(lambda gradient: clock.switch(STUDENT) and None)
        losses = compute_losses(step)
        clock.switch(with_gradient[-1] if with_gradient else ADAPTERS if feature_losses else REST)
        return losses

    model.compute_losses = compute_losses_then_backward
    update = model.guard.step

    def update_apart_from_backward(*args: Any) -> None:
        clock.switch(REST)
        update(*args)

    model.guard.step = update_apart_from_backward
    try:
        yield
    finally:
        del model.compute_losses, model.guard.step
        for handle in handles:
            handle.remove()


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


def measure(model: Any, batch: dict[str, Tensor], *, warmup: int, repeat: int) -> tuple[pd.DataFrame, float]:
    """Runs training steps and measures their parts.

    Args:
        model: A model of this package, in training.
        batch: The input of its ``feed_data``.
        warmup: Steps before the measurement.
        repeat: Measured steps.

    Returns:
        One row per part and measured step (columns step, part, seconds, peak_mib), and the memory in MiB before the
        first measured step.
    """
    clock = Clock(Memory(model.device))
    rows: list[tuple[int, str, float, float]] = []
    before = 0.0
    with watched(model, clock):
        for step in range(warmup + repeat):
            if step == warmup:
                clock.memory.start()
                before = clock.memory.peak()
            clock.start()
            model.feed_data(batch)
            model.optimize_parameters(step + 1)
            clock.switch(REST)
            if step >= warmup:
                rows += [(step, part, clock.seconds[part], clock.peaks[part]) for part in clock.seconds]
    return pd.DataFrame(rows, columns=["step", "part", "seconds", "peak_mib"]), before


def summary(measured: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of the report, as text: a row per part, their sum, and the whole step."""
    last = [ADAPTERS, REST]
    found = [part for part in dict.fromkeys([STUDENT, *measured["part"]]) if part not in last]
    parts = found + [part for part in last if part in set(measured["part"])]
    wholes = measured.groupby("step")["seconds"].sum().tolist()
    samples = {part: measured[measured["part"] == part]["seconds"].tolist() for part in parts}
    medians = {part: statistics.median(values) for part, values in samples.items()}
    total = sum(medians.values())
    peaks = measured.groupby("part")["peak_mib"].max()

    def mib(value: float) -> str:
        return "–" if math.isnan(value) else f"{value:,.0f}"

    table = pd.DataFrame(columns=["median s", "min–max s", "share", "peak MiB"], dtype=object)
    for part in parts:
        values = samples[part]
        spread = f"{min(values):.3f}–{max(values):.3f}"
        table.loc[part] = [
            f"{medians[part]:.3f}",
            spread,
            f"{medians[part] / total:.1%}",
            mib(peaks[part]),
        ]
    table.loc["sum of the parts"] = [f"{total:.3f}", "", "100.0%", ""]
    spread = f"{min(wholes):.3f}–{max(wholes):.3f}"
    table.loc["whole step"] = [f"{statistics.median(wholes):.3f}", spread, "", mib(peaks.max())]
    table.index.name = "part"
    return table


def memory_note(device: Device, before: float) -> str:
    """Returns a sentence on the column of the memory."""
    if math.isnan(before):
        return "Peak MiB: not measured, this system does not report the peak memory of a process."
    memory = "memory of the process" if device == Device.cpu else "memory allocated by torch"
    return (
        f"Peak MiB: {memory} while the part runs, including networks and libraries; "
        f"{before:,.0f} MiB before the first measured step."
    )


def machine(device: Device, threads: int) -> str:
    """Returns a line on the machine."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    if device == Device.cuda:
        name = f"{torch.cuda.get_device_name()}, {name}"
    return f"{name}, {threads} of {os.cpu_count()} CPU threads, torch {torch.__version__}"


@contextmanager
def _batch_is_an_option() -> Iterator[None]:
    """Adds ``--batch`` to problems of the batch size: some losses need more than one image."""
    try:
        yield
    except OptionError as error:
        problems = [
            f"{line} (here: --batch)" if "batch_size_per_gpu" in line else line for line in error.problems
        ]
        raise OptionError(problems) from error


def step(
    opt: Annotated[str, typer.Option("-opt", "--opt", help="Option file of a training run.")],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="Measured steps.")] = 7,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before the measurement.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 1,
    device: Annotated[Device, typer.Option(help="Device of the measurement.")] = Device.cpu,
    force_yml: Annotated[
        list[str] | None, typer.Option("--force_yml", "--force-yml", help="KEY:KEY=VALUE, as in training.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table to this Markdown file.")] = None,
) -> None:
    """Time and peak memory of a training step, part by part: random weights and images, no data needed."""
    batched = [*(force_yml or ()), f"datasets:train:batch_size_per_gpu={batch}"]
    with _batch_is_an_option():
        options = prepare(opt, batched, device)
    torch.set_num_threads(threads)
    size = options["datasets"]["train"]["gt_size"]
    scale = options.get("scale", 1)
    set_random_seed(options.get("manual_seed") or 0)
    model = build_model(options)
    images = {
        "lq": torch.rand(batch, 3, size // scale, size // scale),
        "gt": torch.rand(batch, 3, size, size),
    }
    with _batch_is_an_option():
        measured, before = measure(model, images, warmup=warmup, repeat=repeat)
    text = (
        f"One training step of {options['name']} (batch {batch}, {size}×{size} ground truth), {repeat} steps "
        f"after {warmup} for warm-up.\n{machine(device, threads)}.\n{memory_note(device, before)}\n\n"
        f"{as_markdown(summary(measured))}"
    )
    typer.echo(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
