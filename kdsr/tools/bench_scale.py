"""``kdsr bench scale``: the cost of a training step against its options, and on several processes.

Each setting is measured alone in a process of its own, with random weights and images.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import torch.distributed as dist
import typer
from basicsr.models import build_model
from basicsr.utils import set_random_seed

from kdsr.runtime.errors import OptionError
from kdsr.runtime.memory import keep_freed_memory
from kdsr.tools.bench_options import Device, StepSize
from kdsr.tools.machine import machine
from kdsr.tools.report import as_markdown
from kdsr.tools.step_clock import Memory, mib, now
from kdsr.tools.step_pairs import Setting, Side, median

ALONE, APART, TOGETHER = "1 process", "{} processes, each alone", "{} processes, DDP"


@dataclass(frozen=True)
class Cost:
    """Of a step: images per process, seconds of each measured step, peak memory in MiB (NaN if unknown)."""

    name: str
    images: int
    seconds: list[float]
    peak: float


@dataclass(frozen=True)
class Reduction:
    """Of the all-reduce of a student's gradients alone: MiB, and seconds of each."""

    size: float
    seconds: list[float]


def settings_of(base: Setting, vary: Sequence[str]) -> list[Setting]:
    """The setting as given, then one for each value of ``KEY:KEY=VALUE|VALUE|...``.

    Raises:
        OptionError: A word is not of this form, or a value is wrong.
    """
    found = [base]
    for word in vary:
        key, equals, values = word.partition("=")
        if not (key and equals and values):
            raise OptionError(f"--vary: {word!r}: give KEY:KEY=VALUE|VALUE|...")
        changes = [f"{key}={value}" for value in values.split("|")]
        found += [replace(base, name=change, overrides=(*base.overrides, change)) for change in changes]
    for setting in found:
        setting.options  # noqa: B018  checked before anything is measured
    return found


def steps(setting: Setting, side: Side, count: int) -> list[float]:
    """Seconds of training steps; under a process group all ranks start each together."""
    batch = StepSize.of(setting.options).random_images()
    seconds = []
    for iteration in range(1, count + 1):
        if dist.is_initialized():
            dist.barrier()
        seconds.append(side.step(batch, iteration))
    return seconds


def measured(setting: Setting, warmup: int, repeat: int) -> Cost:
    """The cost of a step in this process, which has run nothing before."""
    logging.disable(logging.INFO)
    torch.set_num_threads(setting.threads)
    keep_freed_memory()  # as a training
    side = setting.side()
    memory = Memory(side.model.device)
    memory.start()
    seconds = steps(setting, side, warmup + repeat)
    return Cost(setting.name, StepSize.of(setting.options).images, seconds[warmup:], memory.peak())


def in_new_process(setting: Setting, warmup: int, repeat: int) -> Cost:
    # a copy without the options: reading them there imports the user's modules
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, replace(setting), warmup, repeat).result()


def _rank(
    rank: int, setting: Setting, world: int, together: bool, folder: str, warmup: int, repeat: int
) -> None:
    """A process of a group: its steps, together as DDP or at the same time; rank 0 writes what it measured."""
    logging.disable(logging.INFO)
    torch.set_num_threads(setting.threads)
    keep_freed_memory()
    cuda = setting.device == Device.cuda
    if cuda:
        torch.cuda.set_device(rank)
    opt = {
        **setting.options,
        "dist": together,
        "rank": rank * together,
        "world_size": world if together else 1,
    }
    set_random_seed(opt.get("manual_seed") or 0)
    side = None if together else Side(build_model(opt), setting.name)  # without a process group: without DDP
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    try:
        side = side or Side(build_model(opt), setting.name)
        memory = Memory(side.model.device)
        memory.start()
        seconds = steps(setting, side, warmup + repeat)[warmup:]
        peak = memory.peak()
        trained = [weight for weight in side.model.bundle.parameters() if weight.requires_grad]
        gradients = torch.zeros(sum(weight.numel() for weight in trained), device=side.model.device)
        reductions = []
        for _ in range(warmup + repeat):
            dist.barrier()
            start = now(gradients.device)
            dist.all_reduce(gradients)
            reductions.append(now(gradients.device) - start)
        if rank == 0:
            found = {
                "seconds": seconds,
                "peak": peak,
                "reduction": reductions[warmup:],
                "mib": gradients.nbytes / 2**20,
            }
            Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def on_processes(
    setting: Setting, world: int, together: bool, warmup: int, repeat: int
) -> tuple[Cost, Reduction]:
    """The cost of a step on several processes of this machine, and of the all-reduce of its gradients alone."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, (replace(setting), world, together, folder, warmup, repeat), world, start_method="spawn"
        )
        found = json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))
    name = (TOGETHER if together else APART).format(world)
    images = StepSize.of(setting.options).images
    return Cost(name, images, found["seconds"], found["peak"]), Reduction(found["mib"], found["reduction"])


def cost_table(costs: Sequence[Cost]) -> pd.DataFrame:
    """The report as text: a row per setting, its ratio to the first one."""
    table = pd.DataFrame(
        columns=["images", "median s", "min–max s", "÷ first", "s per image", "peak MiB"], dtype=object
    )
    first = median(costs[0].seconds)
    for cost in costs:
        seconds, each = median(cost.seconds), cost.seconds
        table.loc[cost.name] = [
            str(cost.images), f"{seconds:.3f}", f"{min(each):.3f}–{max(each):.3f}", f"{seconds / first:.2f}",
            f"{seconds / cost.images:.3f}", mib(cost.peak),
        ]  # fmt: skip
    table.index.name = "setting"
    return table


def process_table(costs: Sequence[Cost], world: int) -> pd.DataFrame:
    """The report as text: images per second of all processes, and their share of ``world`` times those of one."""
    columns = ["median s", "min–max s", "images/s", "efficiency", "peak MiB of one"]
    table = pd.DataFrame(columns=columns, dtype=object)
    for cost in costs:
        seconds, each = median(cost.seconds), cost.seconds
        count = 1 if cost.name == ALONE else world
        table.loc[cost.name] = [
            f"{seconds:.3f}", f"{min(each):.3f}–{max(each):.3f}", f"{count * cost.images / seconds:.2f}",
            f"{efficiency(cost, costs[0]):.1%}", mib(cost.peak),
        ]  # fmt: skip
    table.index.name = "processes"
    return table


def efficiency(cost: Cost, alone: Cost) -> float:
    """Images per second of a process, divided by those of a process that runs alone on the machine."""
    return median(alone.seconds) / median(cost.seconds)


def scale(
    opt: Annotated[str, typer.Option("-opt", "--opt", help="Option file of a training run.")],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY:KEY=VALUE|VALUE|...: a row for each value, all else as given; may be repeated."
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Also measure so many processes, each alone and as DDP.")
    ] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Measured steps.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before the measurement.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch, where --vary says nothing else.")] = 1,
    device: Annotated[Device, typer.Option(help="Device of the measurement.")] = Device.cpu,
    force_yml: Annotated[
        list[str] | None, typer.Option("--force_yml", "--force-yml", help="KEY:KEY=VALUE, as in training.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the tables to this Markdown file.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all measured values to this file.")
    ] = None,
) -> None:
    """Time and peak memory of a training step against its options, and on several processes of this machine."""
    if device == Device.cuda and processes > torch.cuda.device_count() > 0:
        raise OptionError(f"--processes {processes}: there are {torch.cuda.device_count()} GPUs; lower it")
    batched = (*(force_yml or ()), f"datasets:train:batch_size_per_gpu={batch}")
    settings = settings_of(Setting("as given", opt, batched, device, threads), vary or ())
    costs = [in_new_process(setting, warmup, repeat) for setting in settings]
    line, base = machine(device, threads), settings[0].options
    text = (
        f"One training step of {base['name']} ({StepSize.of(base)}), {repeat} steps after {warmup} for warm-up.\n"
        f"{line}.\nPeak MiB: of a process of its own, including networks and libraries.\n\n"
        f"{as_markdown(cost_table(costs))}"
    )
    found: dict[str, Any] = {"machine": line, "options": opt, "costs": [asdict(cost) for cost in costs]}
    if processes > 1:
        alone = replace(costs[0], name=ALONE)
        apart, _ = on_processes(settings[0], processes, False, warmup, repeat)
        together, reduction = on_processes(settings[0], processes, True, warmup, repeat)
        rows, reduced = [alone, apart, together], median(reduction.seconds)
        text += (
            f"\n{as_markdown(process_table(rows, processes))}\nThe all-reduce of {reduction.size:.1f} MiB alone takes "
            f"{1000 * reduced:.1f} ms, {reduced / median(together.seconds):.1%} of a step.\n"
        )
        found |= {
            "processes": [asdict(cost) | {"efficiency": efficiency(cost, alone)} for cost in rows],
            "all_reduce": asdict(reduction),
        }
    typer.echo(text)
    for file, content in ((out, text), (json_file, json.dumps(found, indent=1))):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
