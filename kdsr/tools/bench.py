"""``kdsr bench step``: time and memory of a training step: of its parts, and beside another setting.

The step is the model's ``optimize_parameters``. Weights and images are random: neither data nor checkpoints are needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kdsr.runtime.errors import OptionError
from kdsr.runtime.memory import keep_freed_memory
from kdsr.tools import step_floor
from kdsr.tools.bench_options import Device, StepSize
from kdsr.tools.machine import machine
from kdsr.tools.report import as_markdown
from kdsr.tools.step_pairs import Setting, compare, median
from kdsr.tools.step_parts import measure, summary


def memory_note(device: Device, before: float) -> str:
    """Returns a sentence on the column of the memory."""
    if math.isnan(before):
        return "Peak MiB: not measured, this system does not report the peak memory of a process."
    memory = "memory of the process" if device == Device.cpu else "memory allocated by torch"
    return (
        f"Peak MiB: {memory} while the part runs, including networks and libraries; "
        f"{before:,.0f} MiB before the first measured step."
    )


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
    warmup: Annotated[int, typer.Option(min=0, help="Steps, or pairs, before the measurement.")] = 2,
    batch: Annotated[
        int, typer.Option(min=1, help="Images in a batch; a step has train.accumulate batches.")
    ] = 1,
    device: Annotated[Device, typer.Option(help="Device of the measurement.")] = Device.cpu,
    force_yml: Annotated[
        list[str] | None, typer.Option("--force_yml", "--force-yml", help="KEY:KEY=VALUE, as in training.")
    ] = None,
    vs: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare with another setting, in pairs: KEY:KEY=VALUE, once or more; or plain: the order of work of "
            "DCKD's release; or srmodel: BasicSR's SRModel after a forward pass of the teacher."
        ),
    ] = None,
    floor: Annotated[
        bool,
        typer.Option("--floor", help="Also measure each part alone at its best batch and memory layout."),
    ] = False,
    pairs: Annotated[int, typer.Option(min=1, help="Measured pairs of --vs.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Also write the tables to this Markdown file.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all measured values to this file.")
    ] = None,
) -> None:
    """Time and peak memory of a training step, part by part: random weights and images, no data needed."""
    batched = (*(force_yml or ()), f"datasets:train:batch_size_per_gpu={batch}")
    setting = Setting("as given", opt, batched, device, threads)
    with _batch_is_an_option():
        options = setting.options
        other = setting.versus(vs) if vs else None
        size = StepSize.of(options)
        if other is not None and StepSize.of(other.options)[1:] != size[1:]:
            raise OptionError(
                "--vs: both settings get the same images; leave scale, datasets.train.gt_size and the number of "
                "images, batch × train.accumulate, as they are"
            )
    torch.set_num_threads(threads)
    keep_freed_memory()  # as a training
    torch.manual_seed(options.get("manual_seed") or 0)
    images = size.random_images()
    line = machine(device, threads)
    what = f"One training step of {options['name']} ({size})"
    found: dict[str, Any] = {
        "machine": line, "options": opt, "force_yml": force_yml or [], "threads": threads, "batch": batch,
        "accumulate": size.accumulate, "images": size.images,
    }  # fmt: skip
    with _batch_is_an_option():
        if other is None:
            measured, before = measure(setting.side().model, images, warmup=warmup, repeat=repeat)
            text = f"{what}, {repeat} steps after {warmup} for warm-up.\n{line}.\n{memory_note(device, before)}\n\n"
            text += as_markdown(summary(measured))
            found["parts"] = measured.astype(object).where(measured.notna(), None).to_dict("records")
            seconds = float(measured.groupby("step")["seconds"].sum().median())
        else:
            compared = compare((setting, other), images, warmup=warmup, pairs=pairs)
            text = (
                f"{what}, beside {other.name}, in turn.\n{line}.\n"
                "Peak MiB: each setting alone in a process of its own, including networks and libraries.\n\n"
                f"{as_markdown(compared.table())}"
            )
            if compared.losses:  # SRModel's is another
                text += f"\n{as_markdown(compared.loss_table())}"
            found["vs"] = compared.as_json()
            seconds = median([first for first, _ in compared.seconds])
        if floor:
            keep_freed_memory()  # plain has switched it off
            rows = step_floor.floor(setting.side().model, images)
            text += f"\n{as_markdown(step_floor.table(rows, seconds))}"
            found["floor"] = [asdict(row) for row in rows]
    typer.echo(text)
    for file, content in ((out, text), (json_file, json.dumps(found, indent=1))):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
