"""``kdsr data degrade``: paired training data for deraining, deblurring, dehazing and denoising."""

from __future__ import annotations

import inspect
import re
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

from kdsr.prepare import pairs
from kdsr.prepare.blur_kernels import read_kernels
from kdsr.prepare.pair_writer import PARAMETERS
from kdsr.prepare.sub_images import GT, LQ, Cutting
from kdsr.prepare.synthesis import Degradation, Range, Seeded
from kdsr.prepare.synthetic_blur import Blur
from kdsr.prepare.synthetic_haze import Haze, find_depth_maps
from kdsr.prepare.synthetic_noise import Noise
from kdsr.prepare.synthetic_rain import Rain
from kdsr.runtime.errors import OptionError
from kdsr.runtime.suggestions import nearest

TASKS: dict[str, type[Degradation]] = {kind.name: kind for kind in (Rain, Blur, Haze, Noise)}
OPTIONS_OF = {task: tuple(entry.name for entry in fields(kind)) for task, kind in TASKS.items()}


def _option(task: str, entry: Field[Any]) -> inspect.Parameter:
    """The command-line option for a field of a task's degradation; None if it is not given."""
    default: Any = entry.default
    is_range = isinstance(default, tuple)
    shown = ",".join(f"{end:g}" for end in dict.fromkeys(default)) if is_range else str(default or "")
    option = typer.Option(
        *([f"--{_dashed(entry.name)}"] if isinstance(default, bool) else []),  # without --no-…
        metavar="LOW,HIGH" if is_range else None,
        help=entry.metadata["help"],
        show_default=shown or False,
        rich_help_panel=f"--task {task}",
    )
    kind = str if is_range else entry.metadata["option"] or type(default)
    return inspect.Parameter(
        entry.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def parse_range(option: str, text: str) -> Range:
    """Parses ``5,31`` or a fixed value ``25``, or raises an ``OptionError``."""
    words = [word for word in re.split(r"[,\s]+", text.strip()) if word]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise OptionError(f"--{option} {text!r}: give a number, or two such as 5,31 for a range")
    return numbers[0], numbers[-1]


def build(task: str, options: dict[str, Any]) -> Degradation:
    """Creates the degradation of a task from command-line options by name, None for those not given.

    Raises:
        OptionError: The task, an option or a value is invalid.
        DataError: Kernels or depth maps are missing or invalid.
    """
    if task not in TASKS:
        raise OptionError(f"--task {task!r}: {nearest(task, TASKS)}")
    given = {name: value for name, value in options.items() if value is not None}
    unknown = [f"--{_dashed(name)}" for name in given if name not in OPTIONS_OF[task]]
    if unknown:
        known = ", ".join(f"--{_dashed(name)}" for name in OPTIONS_OF[task])
        raise OptionError(f"{', '.join(unknown)}: not an option of --task {task}, which has {known}")
    if "kernels" in given:
        unused = [f"--{name}" for name in ("size", "shake") if name in given]
        if unused:
            raise OptionError(f"{', '.join(unused)}: only for camera shakes, not with --kernels")
    elif "turn" in given:
        raise OptionError("--turn: only for measured kernels (--kernels)")
    if "depth" in given and "gradient" in given:
        raise OptionError("--gradient: only for random depth, not with --depth")
    settings: dict[str, Any] = {
        name: parse_range(name, value) if isinstance(value, str) else value for name, value in given.items()
    }
    if "kernels" in settings:
        settings["kernels"] = read_kernels(settings["kernels"])
    if "depth" in settings:
        settings["depth"] = find_depth_maps(settings["depth"])
    try:
        return TASKS[task](**settings)
    except OptionError as error:  # begins with the field's name
        raise OptionError([f"--{problem}" for problem in error.problems]) from error


def _folder(option: str, name: str) -> str:
    if not re.fullmatch(r"[\w-]+", name):  # with dots it could be an LMDB's name, or settings.json
        raise OptionError(f"{option} {name!r}: give the plain name of a folder, such as input")
    return name


def degrade(
    sources: pairs.Sources,
    out: pairs.Out,
    task: Annotated[str, typer.Option(help="rain, blur, haze or noise.")],
    seed: Annotated[
        int, typer.Option(help="An image's result depends on this and on its name, and on no other image.")
    ] = 0,
    gt: Annotated[str, typer.Option(help="Name of the clean images' folder.")] = "GT",
    lq: Annotated[str, typer.Option(help="Name of the degraded images' folder.")] = "LQ",
    crop: pairs.Crop = 0,
    step: Annotated[
        int, typer.Option(min=0, help="Distance of neighbouring sub-images; 0: half of --crop.")
    ] = 0,
    thresh: pairs.Thresh = 0,
    min_size: pairs.MinSize = 1,
    lmdb: pairs.Lmdb = False,
    workers: pairs.Workers = pairs.CORES,
    force: pairs.Force = False,
    **settings: Any,
) -> None:
    """Degrade folders of clean images: rain, motion blur, haze or noise.

    OUT gets the clean and the degraded images under equal names, and parameters.jsonl, with the parameters that were
    drawn for each image.
    """
    degradation = build(task, settings)
    folders = {GT: _folder("--gt", gt), LQ: _folder("--lq", lq)}
    if gt == lq:
        raise OptionError(f"--gt and --lq are both {gt!r}; give two names")
    pairs.make(
        sources,
        out,
        Cutting((), 1, crop, step, thresh),
        folders,
        lmdb=lmdb,
        min_size=min_size,
        workers=workers,
        force=force,
        degrade=Seeded(degradation, seed),
        check_names=degradation.check_names if isinstance(degradation, Haze) else None,
    )
    typer.echo(f"{out}: the parameters of each image are in {PARAMETERS}")


def _with_settings() -> inspect.Signature:
    """The signature of ``degrade`` with an option for each field of the degradations, as typer reads it."""
    written = inspect.signature(degrade, eval_str=True)
    *fixed, _ = written.parameters.values()
    drawn = [_option(task, entry) for task, kind in TASKS.items() for entry in fields(kind)]
    return written.replace(parameters=[*fixed, *drawn])


degrade.__signature__ = _with_settings()  # type: ignore[attr-defined]
