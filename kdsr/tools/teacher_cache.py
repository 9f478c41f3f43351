"""``kdsr data teacher-cache``: stores a teacher's outputs, for the images of a training or of a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

from kdsr.data.image_roots import same_names
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.data.stored_outputs import PLAIN, LQFiles, View, digest, encode, entry_name, views_of
from kdsr.deploy.network_file import open_network
from kdsr.models.builder import Builder
from kdsr.models.cached_teacher import cache_folder
from kdsr.models.image_metrics import is_finite, without_normalisation
from kdsr.models.restorer import Restorer
from kdsr.models.tiling import OVERLAP, tile_problems, tiled
from kdsr.options.parse import parse_options
from kdsr.pipeline.run_data import make_dataset, whole_training_images
from kdsr.runtime.errors import DataError, OptionError, TrainingError
from kdsr.tools.output_store import Store, store_in

Network = tuple[nn.Module, int]  # and what the sides of its images must be divisible by


class Depth(StrEnum):
    """Type of the stored numbers."""

    uint8 = "uint8"
    uint16 = "uint16"
    float16 = "float16"


@dataclass(frozen=True)
class Task:
    """What is stored.

    Attributes:
        place: The teacher, for messages.
        images: Their set, for messages.
        root: Where the outputs go.
        dataset: Whole LQ images.
        scale: The teacher's.
        device: Where it computes.
        network: Builds it, for the first missing output.
        keyed: Whether the outputs have names with the view and the hash of the LQ file, for ``train.teacher_cache``;
            else they have those of the LQ images.
        described: The settings that all outputs of a folder share, beside the flags of the command.
    """

    place: str
    images: str
    root: Path
    dataset: SeededDataset
    scale: int
    device: torch.device
    network: Callable[[], Network]
    keyed: bool
    described: dict[str, Any]


def task_of_options(file: str, force_yml: list[str]) -> Task:
    """The outputs for the training images of an option file.

    Raises:
        OptionError: It is wrong, or has no ``train.teacher_cache``.
    """
    overrides = [word for change in force_yml for word in ("--force_yml", change)]
    opt, _ = parse_options(os.getcwd(), True, ["-opt", file, *overrides])
    if not opt["train"].get("teacher_cache"):
        raise OptionError(f"train.teacher_cache: missing in {file}; name the folder of the outputs")
    device = torch.device("cuda" if opt["num_gpu"] else "cpu")

    def network() -> Network:
        net = Builder(opt, device).frozen("t")
        return net, Restorer(opt).multiple_of(net)

    dataset, scale = whole_training_images(opt, with_outputs=False), opt.get("scale") or 1
    root = Path(cache_folder(opt))
    return Task("network_t", "datasets.train", root, dataset, scale, device, network, True, {})


def task_of_folder(teacher: Path, folder: Path, out: Path) -> Task:
    """The outputs of a network in a file for a folder of LQ images.

    Raises:
        CheckpointError: The file has no network that restores images.
        DataError: There are no images.
        OptionError: The outputs would lie among the images, or the network does not take RGB images of any size.
    """
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise OptionError(
            f"-o: {out} is in {folder}, where outputs would be taken for images; give another folder"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_network(teacher, device=device)
    if opened.fixed_size or (opened.channels_in, opened.channels_out) != (3, 3):
        raise OptionError(f"{teacher}: restores no RGB images of any size ({opened.source})")
    options = {"type": "LQImageDataset", "name": str(folder), "phase": "val", "dataroot_lq": str(folder)}
    dataset = make_dataset(str(folder), {**options, "use_hflip": False, "use_rot": False}, 0)
    described = {"teacher": digest(teacher.expanduser().read_bytes()), "scale": opened.scale}
    network = (opened.net, opened.multiple_of)
    return Task(
        str(teacher), str(folder), out, dataset, opened.scale, device, lambda: network, False, described
    )


class Maker:
    """Makes the outputs of a task.

    Args:
        task: The teacher and the images.
        tile: Side of the tiles, and their overlap, in LQ pixels.
        depth: Type of the stored numbers.
    """

    def __init__(self, task: Task, tile: tuple[int, int], depth: Depth) -> None:
        self.task, self.tile, self.depth = task, tile, depth
        self.views = views_of(task.dataset.opt) if task.keyed else [PLAIN]
        self.files = LQFiles(task.dataset.dataset)
        self.network: Network | None = None

    def run(self, store: Store, bar: tqdm) -> int:
        """Makes the missing outputs; returns their number."""
        older: dict[str, list[str]] = {}
        for entry in store.names if self.task.keyed else ():
            older.setdefault(entry.rpartition(".")[0], []).append(entry)
        made = 0
        for position, index in enumerate(self.task.dataset._order):
            wanted = self.entries(index)
            missing = {entry: view for entry, view in wanted.items() if self.is_missing(entry, index, store)}
            bar.update(len(wanted) - len(missing))
            lq = self.task.dataset[position]["lq"][None].to(self.task.device) if missing else None
            for entry, view in missing.items():
                store.write(entry, *encode(self.output(lq, view, self.files.path(index)), self.depth))
                for replaced in older.get(entry.rpartition(".")[0], []):  # of an image that has changed
                    store.remove(replaced)
                made += 1
                bar.update(1)
        return made

    def entries(self, index: int) -> dict[str, View]:
        """The outputs for an image, by their names in the store."""
        name = self.files.name(index)
        if not self.task.keyed:
            return {name: PLAIN}
        lq_digest = digest(self.files.read(index))
        return {entry_name(view, name, lq_digest): view for view in self.views}

    def is_missing(self, entry: str, index: int, store: Store) -> bool:
        if entry not in store.names:
            return True
        return not self.task.keyed and store.is_older(entry, self.files.path(index))

    @torch.no_grad()
    def output(self, lq: Tensor | None, view: View, path: str) -> Tensor:
        """The output for a flipped image, flipped back: (3, H·scale, W·scale), RGB, not normalised."""
        assert lq is not None
        task = self.task
        self.network = self.network or task.network()
        net, multiple = self.network
        whole = tiled(net, view.of(lq).contiguous(), *self.tile, task.scale, multiple)
        mean, std = (getattr(task.dataset, key, None) for key in ("mean", "std"))
        whole = view.undone(without_normalisation(whole, mean, std))[0].float()
        expected = (3, *(task.scale * side for side in lq.shape[-2:]))
        if whole.shape != expected:
            raise OptionError(
                f"{task.place}: gives {'×'.join(map(str, whole.shape))} for {path}, not {'×'.join(map(str, expected))}"
            )
        if not is_finite(whole):
            raise TrainingError(f"{path}: the output of {task.place} is not finite (NaN or infinite)")
        return whole


def teacher_cache(
    teacher: Annotated[
        Path | None, typer.Argument(help="File of a network, in place of an option file: .pth, .safetensors.")
    ] = None,
    folder: Annotated[Path | None, typer.Argument(help="Its LQ images, subfolders included.")] = None,
    opt: Annotated[
        str | None, typer.Option("-opt", "--opt", help="Option file with train.teacher_cache.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="With TEACHER FOLDER: folder of the outputs.")
    ] = None,
    depth: Annotated[
        Depth,
        typer.Option(help="Stored numbers; uint8 and uint16: PNG files, clipped to [0, 1]; float16: arrays."),
    ] = Depth.uint8,
    in_lmdb: Annotated[bool, typer.Option("--lmdb", help="Store an LMDB in place of files.")] = False,
    tile: Annotated[int, typer.Option(min=1, help="Side of the tiles, in LQ pixels.")] = 256,
    overlap: Annotated[int, typer.Option(min=0, help="Overlap of the tiles, in LQ pixels.")] = OVERLAP,
    force_yml: Annotated[
        list[str] | None, typer.Option("--force_yml", "--force-yml", help="KEY:KEY=VALUE, as in training.")
    ] = None,
) -> None:
    """Store a teacher's outputs for whole images. A second call makes only what is missing.

    -opt FILE: for the training images of an option file, and for their flips if the training set flips patches (up to
    eight). TEACHER FOLDER -o OUT: for a folder, under the names of its images; network_t: {type: Outputs, path: OUT}
    reads them, and any other program.
    """
    if problems := tile_problems({"tile": tile, "tile_overlap": overlap}):
        raise OptionError([problem.replace("val.tile_", "--").replace("val.", "--") for problem in problems])
    if opt is not None and teacher is None and out is None:
        task = task_of_options(opt, force_yml or [])
    elif opt is None and teacher and folder and out:
        if in_lmdb or force_yml:
            raise OptionError(
                f"{'--lmdb' if in_lmdb else '--force_yml'}: only works with -opt FILE; leave it out"
            )
        task = task_of_folder(teacher, folder, out)
    else:
        raise OptionError("teacher-cache: give either -opt FILE, or TEACHER FOLDER -o OUT")
    settings = {"depth": str(depth), "lmdb": in_lmdb, "tile": tile, "overlap": overlap, **task.described}
    maker, dataset = Maker(task, (tile, overlap), depth), task.dataset
    files, indices = maker.files, range(len(dataset))
    if problem := same_names((files.name(index), files.path(index)) for index in indices):
        raise DataError(f"{task.images}: {problem}")
    with (
        store_in(task.root, settings) as store,
        tqdm(total=len(dataset) * len(maker.views), unit="image", desc=str(task.root), disable=None) as bar,
    ):
        made = maker.run(store, bar)
    views = f" × {len(maker.views)} views" if len(maker.views) > 1 else ""
    typer.echo(f"{task.root}: complete, {len(dataset)} images{views}; {made} made now")
