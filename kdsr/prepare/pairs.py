"""Shared options and the implementation of the commands that write GT/LQ pairs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from kdsr.data.image_files import list_folder
from kdsr.data.image_info import UnfitImage, probe
from kdsr.data.image_losses import describe_left_out, describe_losses
from kdsr.prepare.pair_writer import Photograph, check_apart, write_pairs
from kdsr.prepare.sub_images import Cutting
from kdsr.prepare.synthesis import Seeded
from kdsr.runtime.errors import DataError

CORES = os.cpu_count() or 1

Sources = Annotated[
    list[Path], typer.Argument(metavar="SRC...", help="Folders of images, including subfolders.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Output folder.")]
Crop = Annotated[int, typer.Option(help="Side of square sub-images, for training; 0: whole images.")]
Thresh = Annotated[int, typer.Option(min=0, help="A remainder at the border up to this size is dropped.")]
MinSize = Annotated[
    int, typer.Option(min=1, help="Leave out images with a smaller side (gt_size must fit into each).")
]
Lmdb = Annotated[bool, typer.Option("--lmdb", help="Make LMDBs as well.")]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes.")]
Force = Annotated[bool, typer.Option("--force", help="Replace folders that exist.")]


def check_depths(paths: Sequence[Path]) -> None:
    """Checks the headers of images, and prints warnings about what is lost in reading them.

    Raises:
        DataError: An image is not supported, or does not have 8 bits per channel.
    """
    infos, deep = [], []
    for path in paths:
        try:
            info = probe(path)
        except UnfitImage as error:
            raise DataError(f"Cannot read image {path}: {error}") from error
        except OSError:
            continue  # read_image() reports it
        infos.append((str(path), info))
        if info.white != 255:
            deep.append(f"{path} has {info.bits} bits per channel")
    if deep:
        more = f" (and {len(deep) - 1} more)" if len(deep) > 1 else ""
        raise DataError(f"{deep[0]}{more}; convert it to 8 bits")
    for loss in describe_losses(infos, len(paths)):
        typer.echo(f"Warning: {loss}", err=True)


def make(
    sources: Sequence[Path],
    out: Path,
    cutting: Cutting,
    folders: dict[int, str],
    *,
    lmdb: bool,
    min_size: int,
    workers: int,
    force: bool,
    degrade: Seeded | None = None,
    check_names: Callable[[list[str]], None] | None = None,
) -> None:
    """Writes the pairs of all images of the sources with a progress bar, and prints a summary.

    ``check_names`` is called with the images' names before anything is written; the other arguments are those of
    :func:`kdsr.prepare.pair_writer.write_pairs`.
    """
    lmdbs = {scale: f"{folder.replace('/', '_')}.lmdb" for scale, folder in folders.items()} if lmdb else {}
    targets = [*folders.values(), *lmdbs.values()]
    check_apart(sources, [out / target for target in targets])
    photographs = []
    for source in sources:
        listing = list_folder(source)
        if not listing.images:
            raise DataError(f"There is no image in {source}")
        photographs += [Photograph(Path(name).stem, source / name) for name in listing.images]
        left_out = describe_left_out(str(source), listing.left_out)
        if left_out:
            typer.echo(f"Warning: {left_out}", err=True)
    check_depths([photograph.path for photograph in photographs])
    photographs.sort(key=lambda photograph: photograph.name)
    if check_names is not None:
        check_names([photograph.name for photograph in photographs])
    with tqdm(total=len(photographs), unit="image", desc=str(out), disable=None) as bar:
        written = write_pairs(
            photographs,
            cutting,
            out,
            folders,
            lmdbs=lmdbs,
            degrade=degrade,
            min_size=min_size,
            workers=workers,
            force=force,
            progress=bar.update,
        )
    typer.echo(f"{out}: {written.pairs} pairs of {written.photographs} images in {', '.join(targets)}")
    if written.too_small:
        listed = ", ".join(written.too_small[:5]) + (", …" if len(written.too_small) > 5 else "")
        least = max(min_size, cutting.multiple_of)
        typer.echo(f"{out}: left out {len(written.too_small)} images below {least} pixels: {listed}")
