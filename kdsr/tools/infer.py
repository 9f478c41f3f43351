"""``kdsr infer``: restores image files with the network in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import pandas as pd
import typer
from tqdm import tqdm

from kdsr.data.image_files import list_folder, sizes_match
from kdsr.data.image_info import ImageInfo
from kdsr.data.image_losses import describe_left_out, describe_losses
from kdsr.data.image_roots import quote, same_names
from kdsr.deploy.benchmarks import partners
from kdsr.deploy.inference import Inference, Settings, Word, device_of
from kdsr.deploy.network_file import open_network
from kdsr.deploy.pictures import Format, read_picture
from kdsr.deploy.restore_files import Job, restore_files
from kdsr.models.image_metrics import metric_values, without_numpy_warnings
from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.errors import DataError, OptionError, error_line
from kdsr.tools.report import as_text

METRICS_FILE = "metrics.csv"
_SHOWN = 20  # images in the table; all are in the file


def find_jobs(inputs: Sequence[Path], out: Path, format: Format) -> list[Job]:
    """The images of files and folders, and the files of their results.

    A folder is searched with its sub-folders, which ``out`` gets as well. ``out`` with the ending of an image is the
    result of a single file.

    Raises:
        OptionError: An input is missing, a folder has no image, or a result would overwrite an input or another result.
    """
    jobs: list[Job] = []
    for place in inputs:
        if place.is_file():
            names, folder = [place.name], place.parent
        elif not place.exists():
            raise OptionError(f"INPUT: there is no file or folder {place}")
        else:
            try:
                listing = list_folder(place)
            except DataError as error:
                raise OptionError(f"INPUT: {error}") from error
            if not listing.images:
                raise OptionError(f"INPUT: there is no image in {place}")
            if left_out := describe_left_out(str(place), listing.left_out):
                typer.echo(f"Warning: {left_out}", err=True)
            names, folder = listing.images, place
            if out.resolve().is_relative_to(place.resolve()):
                raise OptionError(f"-o {out}: is in the input {place}; choose another folder")
        jobs += [Job(folder / name, out / Path(name).with_suffix(f".{format}"), format) for name in names]
    endings = {"jpeg": Format.jpg, "tiff": Format.tif, **Format.__members__}
    own = endings.get(out.suffix[1:].lower())
    if own and len(inputs) == 1 and inputs[0].is_file():
        jobs = [Job(inputs[0], out, own)]
    elif out.is_file():
        raise OptionError(f"-o {out}: is a file; give a folder")
    sources = {job.source.resolve() for job in jobs}
    if problem := same_names((str(job.target), str(job.source)) for job in jobs):
        raise OptionError(f"INPUT: {problem}")
    if over := [str(job.source) for job in jobs if job.target.resolve() in sources]:
        raise OptionError(
            f"-o {out}: results would overwrite the inputs ({quote(over)}); choose another folder"
        )
    return jobs


def find_gt(jobs: Sequence[Job], inputs: Sequence[Path], gt: Path, scale: int) -> dict[Path, Path]:
    """The ground truth of each input: the image of its name below ``gt``, with any ending and without ``xSCALE``.

    Raises:
        OptionError: One is missing.
    """
    try:
        images = list_folder(gt).images
    except DataError as error:
        raise OptionError(f"--gt: {error}") from error
    names = {}
    for job in jobs:
        root = next((place for place in inputs if place.is_dir() and job.source.is_relative_to(place)), None)
        names[job.source] = str(job.source.relative_to(root)) if root else job.source.name
    if any(job.target.resolve().is_relative_to(gt.resolve()) for job in jobs):
        raise OptionError(f"--gt {gt}: results would be written into it; choose another -o")
    found = partners(names.values(), images, scale)
    if missing := [str(source) for source, name in names.items() if found[name] is None]:
        raise OptionError(f"--gt: {gt} has no image of the name of {quote(missing)}")
    return {source: gt / str(found[name]) for source, name in names.items()}


def measured(values: np.ndarray, gt: Path, scale: int, rgb: bool) -> dict[str, float]:
    """PSNR in dB and SSIM of a restored image, without ``scale`` border pixels at each side (none at scale 1).

    Args:
        values: (H, W, 3), BGR, or (H, W), grey; uint8.
        gt: File of the ground truth; up to ``scale - 1`` pixels at its bottom and right are cut off.
        scale: Upscaling factor.
        rgb: Whether the colours are compared, and not the luminance.

    Raises:
        DataError: The ground truth cannot be read or has another size, or a value is not finite.
    """
    truth = read_picture(gt).in_8_bits()
    height, width = values.shape[:2]
    if not sizes_match(truth.shape[:2], (height // scale, width // scale), scale, allow_remainder=True):
        raise DataError(
            f"{gt}: has {truth.shape[1]}x{truth.shape[0]} pixels, the restored image {width}x{height}; another scale?"
        )
    truth = truth[:height, :width]
    if values.ndim == 2:
        truth = truth[..., 1]
    options = {"crop_border": scale if scale > 1 else 0, "test_y_channel": not rgb}
    metrics = {name: {"type": f"calculate_{name}", **options} for name in ("psnr", "ssim")}
    found, problems = metric_values(values, truth, metrics)
    if problems:
        raise DataError([f"{gt}: {name}: {why}" for name, why in problems.items()])
    return found


def write_metrics(values: dict[str, dict[str, float]], file: Path | None, rgb: bool) -> str:
    """Writes the values of each image as CSV, and returns the table of them and of their means."""
    table = pd.DataFrame.from_dict(values, orient="index")
    if file is not None:
        text = table.rename_axis("image").to_csv()
        atomic_write(file, lambda opened: opened.write(text.encode()))
    shown = table if len(table) <= _SHOWN else table.iloc[:0]
    shown = pd.concat([shown, table.mean().to_frame(f"mean of {len(table)}").T])
    shown = pd.DataFrame(
        {"PSNR": shown["psnr"].map("{:.2f}".format), "SSIM": shown["ssim"].map("{:.4f}".format)}
    )
    shown.index.name = f"{'RGB' if rgb else 'Y'}, dB"
    return as_text(shown, below=1)


def infer(
    weights: Annotated[Path, typer.Argument(help="Checkpoint (.pth, .safetensors, ...) or exported .onnx.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Images, and folders of images.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder of the results; for a single image also a file.")
    ],
    opt: Annotated[
        Path | None,
        typer.Option("-opt", "--opt", help="Option file with the network, if the checkpoint lacks it."),
    ] = None,
    gt: Annotated[
        Path | None, typer.Option(help="Folder of the ground truth, same names: measures PSNR and SSIM.")
    ] = None,
    rgb: Annotated[
        bool, typer.Option("--rgb", help="Measure colours in place of the luminance (Y).")
    ] = False,
    tile: Annotated[
        int | None,
        typer.Option(
            min=0, help="Side of the tiles in input pixels; 0: whole images. Default: by the free memory."
        ),
    ] = None,
    self_ensemble: Annotated[
        bool, typer.Option("--self-ensemble", help="Average eight views: eight times as long.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU where there is one.")
    ] = None,
    precision: Annotated[
        Word, typer.Option(help="auto: bf16 where the device computes in it.")
    ] = Word.float32,
    format: Annotated[
        Format, typer.Option(help="Of the results; jpg has neither alpha nor 16 bits.")
    ] = Format.png,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out images whose result is there.")] = False,
) -> None:
    """Restore images or folders of images with the network in a file."""
    cv2.utils.logging.setLogLevel(0)  # errors of files are reported below
    jobs = find_jobs(inputs, out, format)
    settings = Settings(device_of(device), precision, tile, self_ensemble)
    opened = open_network(weights, opt, settings.device)
    truths = {} if gt is None else find_gt(jobs, inputs, gt, opened.scale)
    inference = Inference(opened, settings)
    typer.echo(f"{weights}: {opened.source}, on {settings.device}, {precision}")
    for note in opened.notes:
        typer.echo(note)
    there = {job.target: job for job in jobs if resume and job.target.exists()}
    new = [job for job in jobs if job.target not in there]
    values: dict[str, dict[str, float]] = {}
    infos: list[tuple[str, ImageInfo]] = []

    def measure(job: Job, image: np.ndarray) -> dict[str, float]:
        return measured(image, truths[job.source], opened.scale, rgb) if truths else {}

    start, failed = time.perf_counter(), 0
    with without_numpy_warnings(), tqdm(total=len(new), unit="image", disable=None) as bar:
        for done in restore_files(inference, new, lambda job, result: measure(job, result.in_8_bits())):
            bar.update()
            failed += bool(done.problems)
            for problem in done.problems:
                bar.write(error_line(problem), file=sys.stderr)
            if done.info is not None:
                infos.append((str(done.job.source), done.info))
            if truths and not done.problems:
                values[name_in(out, done.job)] = done.value
    seconds = time.perf_counter() - start
    for loss in describe_losses([(name, without_alpha(info)) for name, info in infos], len(infos)):
        typer.echo(f"Warning: {loss}", err=True)
    for job in there.values() if truths else ():
        values[name_in(out, job)] = measure(job, read_picture(job.target).in_8_bits())
    if values:
        names = [name_in(out, job) for job in jobs]
        values = {name: values[name] for name in names if name in values}
        file = None if out == jobs[0].target else out / METRICS_FILE
        typer.echo(write_metrics(values, file, rgb))
    typer.echo(summary(out, len(new) - failed, seconds, len(there), failed))
    raise typer.Exit(int(failed > 0))


def name_in(out: Path, job: Job) -> str:
    """The name of an image in tables: that of its result."""
    return str(job.target.relative_to(out).with_suffix("")) if job.target != out else job.target.stem


def summary(out: Path, restored: int, seconds: float, there: int, failed: int) -> str:
    """The last line of the command."""
    rate = f" in {seconds:.1f} s ({restored / seconds:.2f} images/s)" if restored else ""
    parts = [f"{restored} image{'s' * (restored != 1)} restored{rate}"]
    parts += [f"{there} there already"] if there else []
    parts += [f"{failed} failed"] if failed else []
    return f"{out}: {', '.join(parts)}"


def without_alpha(info: ImageInfo) -> ImageInfo:
    return replace(info, losses=tuple(loss for loss in info.losses if loss != "alpha"))  # it is kept
