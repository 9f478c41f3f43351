"""``kdsr data teacher-cache``: stores the teacher's outputs for the training images of an option file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Protocol

import lmdb
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from kdsr.data.image_roots import same_names
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.data.stored_outputs import LQFiles, View, digest, encode, entries_of, entry_name, views_of
from kdsr.models.builder import Builder
from kdsr.models.cached_teacher import LMDB, cache_folder
from kdsr.models.image_metrics import is_finite, without_normalisation
from kdsr.models.restorer import Restorer
from kdsr.models.tiling import OVERLAP, tile_problems, tiled
from kdsr.options.parse import parse_options
from kdsr.pipeline.run_data import whole_training_images
from kdsr.runtime.atomic_files import atomic_write, remove_temporaries
from kdsr.runtime.errors import DataError, OptionError, TrainingError

SETTINGS = "settings.json"


class Depth(StrEnum):
    """Type of the stored numbers."""

    uint8 = "uint8"
    uint16 = "uint16"
    float16 = "float16"


class Store(Protocol):
    """Where outputs are written, by name without ending."""

    names: set[str]

    def write(self, name: str, content: bytes, ending: str) -> None: ...

    def remove(self, name: str) -> None: ...


class FolderStore:
    """A file for each output, written atomically."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in filter(Path.is_dir, root.rglob("*")):
            remove_temporaries(folder)  # of a killed command
        self._files = entries_of(str(root))
        self.names = set(self._files)

    def write(self, name: str, content: bytes, ending: str) -> None:
        atomic_write(self.root / f"{name}{ending}", lambda file: file.write(content))

    def remove(self, name: str) -> None:
        (self.root / self._files[name]).unlink()


class LmdbStore:
    """An LMDB with one transaction for each output."""

    def __init__(self, path: Path) -> None:
        self.environment = lmdb.open(str(path), map_size=2**28)
        with self.environment.begin() as transaction, transaction.cursor() as cursor:
            self.names = {bytes(key).decode() for key in cursor.iternext(values=False)}

    def write(self, name: str, content: bytes, ending: str) -> None:
        try:
            with self.environment.begin(write=True) as transaction:
                transaction.put(name.encode(), content)
        except lmdb.MapFullError:
            self.environment.set_mapsize(2 * self.environment.info()["map_size"] + len(content))
            self.write(name, content, ending)

    def remove(self, name: str) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.delete(name.encode())


@contextmanager
def store_in(root: Path, settings: dict[str, Any]) -> Iterator[Store]:
    """Opens the outputs in a folder; writes the settings, or compares them with those that are there.

    Raises:
        OptionError: The folder has outputs with other settings.
        TrainingError: It cannot be written.
    """
    file = root / SETTINGS
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        if other := [f"{key} {there.get(key)}" for key, value in settings.items() if there.get(key) != value]:
            raise OptionError(
                f"{root}: its outputs have {', '.join(other)}; give the same options, or remove the folder"
            )
    text = json.dumps(settings, indent=1) + "\n"
    atomic_write(file, lambda out: out.write(text.encode()))
    if not settings["lmdb"]:
        yield FolderStore(root)
        return
    try:
        store = LmdbStore(root / LMDB)
        try:
            yield store
        finally:
            store.environment.close()
    except lmdb.Error as error:
        raise TrainingError(f"{root / LMDB}: cannot be written ({error})") from error


class Maker:
    """Makes the outputs of a teacher for the images of a data set.

    Args:
        opt: The parsed options of a training.
        dataset: The training set, with whole images.
        tile: Side of the tiles, and their overlap, in LQ pixels.
        depth: Type of the stored numbers.
    """

    def __init__(
        self, opt: dict[str, Any], dataset: SeededDataset, tile: tuple[int, int], depth: Depth
    ) -> None:
        self.opt, self.dataset, self.tile, self.depth = opt, dataset, tile, depth
        self.scale = opt.get("scale") or 1
        self.device = torch.device("cuda" if opt["num_gpu"] else "cpu")
        self.views = views_of(dataset.opt)
        self.files = LQFiles(dataset.dataset)
        self.net: torch.nn.Module | None = None  # built for the first missing output

    def run(self, store: Store, bar: tqdm) -> int:
        """Makes the missing outputs; returns their number."""
        older: dict[str, list[str]] = {}
        for entry in store.names:
            older.setdefault(entry.rpartition(".")[0], []).append(entry)
        made = 0
        for position, index in enumerate(self.dataset._order):
            name, lq_digest = self.files.name(index), digest(self.files.read(index))
            wanted = {entry_name(view, name, lq_digest): view for view in self.views}
            missing = {entry: view for entry, view in wanted.items() if entry not in store.names}
            bar.update(len(wanted) - len(missing))
            lq = self.dataset[position]["lq"][None].to(self.device) if missing else None
            for entry, view in missing.items():
                store.write(entry, *encode(self.output(lq, view, self.files.path(index)), self.depth))
                for replaced in older.get(entry.rpartition(".")[0], []):  # of an image that has changed
                    store.remove(replaced)
                made += 1
                bar.update(1)
        return made

    @torch.no_grad()
    def output(self, lq: Tensor | None, view: View, path: str) -> Tensor:
        """The output for a flipped image, flipped back: (3, H·scale, W·scale), RGB, not normalised."""
        assert lq is not None
        if self.net is None:
            self.net = Builder(self.opt, self.device).frozen("t")
        multiple = Restorer(self.opt).multiple_of(self.net)
        whole = tiled(self.net, view.of(lq).contiguous(), *self.tile, self.scale, multiple)
        mean, std = (getattr(self.dataset, key, None) for key in ("mean", "std"))
        whole = view.undone(without_normalisation(whole, mean, std))[0].float()
        expected = (3, *(self.scale * side for side in lq.shape[-2:]))
        if whole.shape != expected:
            raise OptionError(
                f"network_t: gives {'×'.join(map(str, whole.shape))} for {path}, not {'×'.join(map(str, expected))}"
            )
        if not is_finite(whole):
            raise TrainingError(f"{path}: the output of network_t is not finite (NaN or infinite)")
        return whole


def teacher_cache(
    opt: Annotated[str, typer.Option("-opt", "--opt", help="Option file with train.teacher_cache.")],
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
    """Store the teacher's outputs for the training images. A second call makes only what is missing.

    The outputs are those of whole images, and of their flips if the training set flips patches (up to eight).
    """
    if problems := tile_problems({"tile": tile, "tile_overlap": overlap}):
        raise OptionError([problem.replace("val.tile_", "--").replace("val.", "--") for problem in problems])
    overrides = [word for change in force_yml or () for word in ("--force_yml", change)]
    options, _ = parse_options(os.getcwd(), True, ["-opt", opt, *overrides])
    if not options["train"].get("teacher_cache"):
        raise OptionError(f"train.teacher_cache: missing in {opt}; name the folder of the outputs")
    settings = {"depth": str(depth), "lmdb": in_lmdb, "tile": tile, "overlap": overlap}
    dataset = whole_training_images(options, with_outputs=False)
    maker = Maker(options, dataset, (tile, overlap), depth)
    files, indices = maker.files, range(len(dataset))
    if problem := same_names((files.name(index), files.path(index)) for index in indices):
        raise DataError(f"datasets.train: {problem}")
    root = Path(cache_folder(options))
    with (
        store_in(root, settings) as store,
        tqdm(total=len(dataset) * len(maker.views), unit="image", desc=str(root), disable=None) as bar,
    ):
        made = maker.run(store, bar)
    views = f" × {len(maker.views)} views" if len(maker.views) > 1 else ""
    typer.echo(f"{root}: complete, {len(dataset)} images{views}; {made} made now")
