"""``kdsr data``: prepares data sets in the layout that the templates expect."""

from __future__ import annotations

import math
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from kdsr.prepare import pairs
from kdsr.prepare.sample import SOURCES, folder_names, make_sample
from kdsr.prepare.sub_images import GT, Cutting
from kdsr.runtime.errors import OptionError

BENCHMARK_MULTIPLE = 12  # the same ground truth for x2, x3 and x4


class Layout(StrEnum):
    """Naming schemes of the folders."""

    plain = "plain"
    benchmark = "benchmark"
    div2k = "div2k"


def parse_scales(text: str) -> tuple[int, ...]:
    """Parses ``2,3,4`` (or with spaces) into whole numbers of at least 2, or raises an ``OptionError``."""
    words = [word for word in re.split(r"[,\s]+", text) if word]
    if not words or not all(word.isdecimal() and int(word) >= 2 for word in words):
        raise OptionError(f"--scales {text!r}: give whole numbers of at least 2, such as 2,3,4")
    return tuple(sorted({int(word) for word in words}))


def target_folders(layout: Layout, source: str, scales: tuple[int, ...], cut: bool) -> dict[int, str]:
    """The folders of a layout by scale: see the help of ``kdsr data sr``; ``source`` is the name of the source folder.

    ``div2k`` has BasicSR's names of sub-images (``cut``), and ``_whole`` for whole images.
    """
    if layout is Layout.plain:
        return folder_names(scales)
    if layout is Layout.benchmark:
        return {GT: f"GTmod{BENCHMARK_MULTIPLE}"} | {scale: f"LRbicx{scale}" for scale in scales}
    ending = "_sub" if cut else "_whole"
    stem = source.removesuffix("_HR")
    return {GT: f"{stem}_HR{ending}"} | {scale: f"{stem}_LR_bicubic/X{scale}{ending}" for scale in scales}


def sample(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("datasets/sample"),
    scales: Annotated[str, typer.Option(help="Factors of the LQ images.")] = "2,3,4",
    workers: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
) -> None:
    """Make a small data set of photographs in scikit-image, without a download."""
    with tqdm(total=len(SOURCES), unit="photo", desc=str(out), disable=None) as bar:
        written = make_sample(out, parse_scales(scales), workers=workers, progress=bar.update)
    state = "written" if written else "already complete"
    typer.echo(f"{out}: {state} (origin and terms: {out / 'README.md'})")


def sr(
    sources: pairs.Sources,
    out: pairs.Out,
    scales: Annotated[str, typer.Option(help="Factors of the LQ images.")] = "2,3,4",
    layout: Annotated[
        Layout,
        typer.Option(
            help="plain: GT, LR_x4. benchmark: GTmod12, LRbicx4. div2k (SRC is named DIV2K_train_HR): "
            "DIV2K_train_HR_sub, DIV2K_train_LR_bicubic/X4_sub."
        ),
    ] = Layout.plain,
    crop: pairs.Crop = 0,
    step: Annotated[
        int,
        typer.Option(
            help="Distance of neighbouring sub-images; 0: half of --crop, rounded to a multiple of the scales."
        ),
    ] = 0,
    thresh: pairs.Thresh = 0,
    min_size: pairs.MinSize = 1,
    lmdb: pairs.Lmdb = False,
    workers: pairs.Workers = pairs.CORES,
    force: pairs.Force = False,
) -> None:
    """Make GT and LQ folders (Matlab's bicubic) from folders of images, such as DIV2K or T91."""
    factors = parse_scales(scales)
    multiple = math.lcm(*factors)
    if layout is Layout.benchmark:
        multiple = math.lcm(multiple, BENCHMARK_MULTIPLE)
        if crop:
            raise OptionError("--crop: benchmark images are not cut; use another --layout")
    cutting = Cutting(factors, multiple, crop, step, thresh)
    if layout is Layout.div2k and len(sources) > 1:
        raise OptionError("--layout div2k names its folders after SRC: give only one")
    # not resolve(): the link's name counts, not its target's
    folders = target_folders(layout, Path(os.path.abspath(sources[0])).name, factors, bool(crop))
    pairs.make(sources, out, cutting, folders, lmdb=lmdb, min_size=min_size, workers=workers, force=force)
