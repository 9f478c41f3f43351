"""``kdsr data degrade``: paired training data for deraining, deblurring, dehazing and denoising."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
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

TASKS: dict[str, Callable[..., Degradation]] = {kind.name: kind for kind in (Rain, Blur, Haze, Noise)}
OPTIONS_OF = {
    "rain": ("angle", "length", "width", "density", "strength", "veil", "layers"),
    "blur": ("size", "shake", "kernels", "turn", "linear_light"),
    "haze": ("airlight", "tint", "beta", "gradient", "depth"),
    "noise": ("sigma",),
}


def _range_option(help_text: str, default: Range, panel: str) -> Any:
    shown = f"{default[0]:g}" if default[0] == default[1] else f"{default[0]:g},{default[1]:g}"
    return typer.Option(
        metavar="LOW,HIGH", help=help_text, show_default=shown, rich_help_panel=f"--task {panel}"
    )


def parse_range(option: str, text: str) -> Range:
    """Reads ``5,31`` or, for a fixed value, ``25``.

    Raises:
        OptionError: Neither one nor two numbers.
    """
    words = [word for word in re.split(r"[,\s]+", text.strip()) if word]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise OptionError(f"--{option} {text!r}: give a number, or two such as 5,31 for a range")
    return numbers[0], numbers[-1]


def build(task: str, options: dict[str, Any]) -> Degradation:
    """The degradation of a task.

    Args:
        task: A key of ``TASKS``.
        options: Of the command line by name; None where one was not given.

    Raises:
        OptionError: There is no such task, it has no such option, or a value is unfit.
        DataError: Kernels or depth maps are missing or unfit.
    """
    if task not in TASKS:
        raise OptionError(f"--task {task!r}: {nearest(task, TASKS)}")
    given = {name: value for name, value in options.items() if value is not None}
    strange = [f"--{name.replace('_', '-')}" for name in given if name not in OPTIONS_OF[task]]
    if strange:
        known = ", ".join(f"--{name.replace('_', '-')}" for name in OPTIONS_OF[task])
        raise OptionError(f"{', '.join(strange)}: not an option of --task {task}, which has {known}")
    if "kernels" in given:
        unused = [f"--{name}" for name in ("size", "shake") if name in given]
        if unused:
            raise OptionError(f"{', '.join(unused)}: for camera shakes; with --kernels there are none")
    elif "turn" in given:
        raise OptionError("--turn: for measured kernels (--kernels); a camera shake is random already")
    if "depth" in given and "gradient" in given:
        raise OptionError("--gradient: for random depth; with --depth there is none")
    settings: dict[str, Any] = {
        name: parse_range(name, value) if isinstance(value, str) else value for name, value in given.items()
    }
    if "kernels" in settings:
        settings["kernels"] = read_kernels(settings["kernels"])
    if "depth" in settings:
        settings["depth"] = find_depth_maps(settings["depth"])
    try:
        return TASKS[task](**settings)
    except OptionError as error:  # which names the field
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
    angle: Annotated[
        str | None,
        _range_option("Degrees from the vertical; positive falls to the right.", Rain.angle, "rain"),
    ] = None,
    length: Annotated[
        str | None, _range_option("Length of the nearest streaks, in pixels.", Rain.length, "rain")
    ] = None,
    width: Annotated[
        str | None, _range_option("Width of the nearest streaks, in pixels.", Rain.width, "rain")
    ] = None,
    density: Annotated[
        str | None, _range_option("Mean number of streaks over a pixel.", Rain.density, "rain")
    ] = None,
    strength: Annotated[
        str | None,
        _range_option("Mean brightness of the nearest streaks, 0 to 1.", Rain.strength, "rain"),
    ] = None,
    veil: Annotated[
        str | None, _range_option("Brightness of the mist over all, 0 to 1.", Rain.veil, "rain")
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Number of distances, 1 to 10.", show_default=str(Rain.layers), rich_help_panel="--task rain"
        ),
    ] = None,
    size: Annotated[
        str | None, _range_option("Extent of a camera shake, in pixels.", Blur.size, "blur")
    ] = None,
    shake: Annotated[
        str | None, _range_option("0: a straight line; 1: random motion prevails.", Blur.shake, "blur")
    ] = None,
    kernels: Annotated[
        list[Path] | None,
        typer.Option(
            help="Measured kernels instead: a folder or file (image, .npy, .mat); may be repeated.",
            rich_help_panel="--task blur",
        ),
    ] = None,
    turn: Annotated[
        bool | None,
        typer.Option(
            "--turn",
            help="Turn measured kernels by multiples of 90 degrees, and mirror them, at random.",
            rich_help_panel="--task blur",
        ),
    ] = None,
    linear_light: Annotated[
        bool | None,
        typer.Option(
            "--linear-light", help="Blur linear light, not sRGB values.", rich_help_panel="--task blur"
        ),
    ] = None,
    airlight: Annotated[
        str | None, _range_option("Brightness of the haze, 0 to 1.", Haze.airlight, "haze")
    ] = None,
    tint: Annotated[
        float | None,
        typer.Option(
            help="Largest deviation of its channels.",
            show_default=str(Haze.tint),
            rich_help_panel="--task haze",
        ),
    ] = None,
    beta: Annotated[
        str | None,
        _range_option("Scattering coefficient; the farthest point has depth 1.", Haze.beta, "haze"),
    ] = None,
    gradient: Annotated[
        str | None,
        _range_option("Share of a vertical ramp in a random depth, 0 to 1.", Haze.gradient, "haze"),
    ] = None,
    depth: Annotated[
        Path | None,
        typer.Option(
            help="Folder of depth maps instead (grey images or .npy, brighter is farther), named as the images.",
            rich_help_panel="--task haze",
        ),
    ] = None,
    sigma: Annotated[
        str | None,
        _range_option("Standard deviation, in units of 0 to 255.", Noise.sigma, "noise"),
    ] = None,
) -> None:
    """Degrade folders of clean images: rain, motion blur, haze or noise.

    OUT gets the clean and the degraded images under equal names, and parameters.jsonl, which states what was
    drawn for each image.
    """
    given = locals()
    degradation = build(task, {name: given[name] for names in OPTIONS_OF.values() for name in names})
    folders = {GT: _folder("--gt", gt), LQ: _folder("--lq", lq)}
    if gt == lq:
        raise OptionError(f"--gt and --lq are both {gt!r}; give two names")
    if crop < 0:
        raise OptionError(f"--crop {crop}: must be 0 (whole images) or positive")
    cutting = Cutting((), 1, crop, (step or max(crop // 2, 1)) if crop else 0, thresh)
    pairs.make(
        sources,
        out,
        cutting,
        folders,
        lmdb=lmdb,
        min_size=min_size,
        workers=workers,
        force=force,
        degrade=Seeded(degradation, seed),
        check_names=degradation.check_names if isinstance(degradation, Haze) else None,
    )
    typer.echo(f"{out}: what was drawn for each image is in {PARAMETERS}")
