"""Writes GT/LQ folders and LMDBs in the layout that BasicSR reads."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from basicsr.utils.lmdb_util import LmdbMaker

from kdsr.data.image_files import read_image
from kdsr.data.resize import mod_crop
from kdsr.prepare.sub_images import GT, Cutting, cut, encode_png
from kdsr.prepare.synthesis import Seeded
from kdsr.runtime.errors import DataError, OptionError

PARAMETERS = "parameters.jsonl"
SETTINGS = "settings.json"
_PNG_COMPRESSION = 1


@dataclass(frozen=True)
class Photograph:
    """A source image."""

    name: str  # prefix of the names of its results
    path: Path
    window: tuple[int, int, int, int] | None = None  # top, left, height and width of the used part; None: all


@dataclass(frozen=True)
class Written:
    """The result of :func:`write_pairs`: numbers of images, and names of photographs that were too small."""

    photographs: int
    pairs: int
    too_small: tuple[str, ...]


Shape = tuple[int, ...]


class _Made(NamedTuple):
    """Names and shapes of the images of one photograph (none if too small), and its degradation."""

    shapes: list[tuple[str, dict[int, Shape]]]
    parameters: dict[str, Any]


def _write_one(
    photograph: Photograph,
    cutting: Cutting,
    folders: dict[int, str],
    min_size: int,
    degrade: Seeded | None,
) -> _Made:
    image = read_image(photograph.path)
    if photograph.window is not None:
        top, left, height, width = photograph.window
        image = image[top : top + height, left : left + width]
    if min(mod_crop(image, cutting.multiple_of).shape[:2]) < max(min_size, 1):
        return _Made([], {})
    degraded, parameters = (None, {}) if degrade is None else degrade(photograph.name, image)
    shapes = []
    for ending, pieces in cut(image, cutting, degraded):
        name = photograph.name + ending
        for scale, piece in pieces.items():
            Path(folders[scale], f"{name}.png").write_bytes(encode_png(piece))
        shapes.append((name, {scale: piece.shape for scale, piece in pieces.items()}))
    return _Made(shapes, parameters)


def _map_processes(
    work: Callable[[Photograph], _Made], photographs: Sequence[Photograph], workers: int
) -> Iterator[_Made]:
    if workers <= 1 or len(photographs) <= 1:
        yield from map(work, photographs)
        return
    context = multiprocessing.get_context()
    # one OpenCV thread per process
    with ProcessPoolExecutor(
        min(workers, len(photographs)), context, initializer=cv2.setNumThreads, initargs=(0,)
    ) as pool:
        yield from pool.map(work, photographs)


def write_lmdb(folder: Path, target: Path, shapes: dict[str, Shape]) -> None:
    """Packs the PNG files of a folder unchanged into an LMDB with BasicSR's ``meta_info.txt``.

    ``target`` must not exist; its name ends in ``.lmdb``. ``shapes`` are (H, W) or (H, W, C) by name without extension.
    """
    sizes = [(folder / f"{name}.png").stat().st_size for name in shapes]
    # each value starts on a new page; 50 % more for the tree
    map_size = int(1.5 * sum(size + 2 * 4096 for size in sizes)) + 2**20
    maker = LmdbMaker(str(target), map_size=map_size, compress_level=_PNG_COMPRESSION)
    try:
        for name in sorted(shapes):
            height, width, channels = (*shapes[name], 1)[:3]
            maker.put((folder / f"{name}.png").read_bytes(), name, (height, width, channels))
    finally:
        maker.close()


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as its target, removed at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".kdsr-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Moves a folder or file out of a :func:`temporary_folder` to ``target``; moves the old one in to be removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.replace(target, new.with_name(f"{new.name}.replaced"))
    os.replace(new, target)


def check_names(photographs: Iterable[Photograph], lmdb: bool) -> None:
    """Raises a ``DataError`` for photographs whose results would overwrite each other or be misread by BasicSR."""
    seen: dict[str, Path] = {}
    for photograph in photographs:
        name, path = photograph.name, photograph.path
        if name in seen:
            raise DataError(f"{seen[name]} and {path} would both become {name}; rename one")
        if lmdb and (not name.isascii() or any(character in ". \t\n" for character in name)):
            # BasicSR cuts LMDB keys at the first dot and writes one per line, as ASCII, before a space
            raise DataError(f"{path}: rename it; BasicSR's LMDBs need ASCII names without dots and spaces")
        seen[name] = path


def check_apart(sources: Iterable[Path], targets: Iterable[Path]) -> None:
    """Raises an ``OptionError`` if a source (file or folder) is a target, is inside one, or contains one."""
    places = [(target, target.resolve()) for target in targets]
    for source in sources:
        # a link, and what it points to
        for real in {source.resolve(), source.parent.resolve() / source.name}:
            for target, place in places:
                if real.is_relative_to(place) or place.is_relative_to(real):
                    raise OptionError(
                        f"{target} would overwrite the originals ({source}); choose another OUT"
                    )


def is_taken(path: Path) -> bool:
    """Whether a path is a file, or a folder that is not empty."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def write_pairs(
    photographs: Sequence[Photograph],
    cutting: Cutting,
    out: Path,
    folders: dict[int, str],
    *,
    lmdbs: dict[int, str] | None = None,
    degrade: Seeded | None = None,
    min_size: int = 1,
    workers: int = 1,
    force: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Written:
    """Writes GT and LQ images of photographs, as PNG files and optionally as LMDBs.

    Folders are written to a temporary folder and moved when all are complete. With ``degrade``, ``out`` also gets the
    parameters of each photograph (``parameters.jsonl``, sorted by name) and the settings (``settings.json``).

    Args:
        photographs: The sources.
        cutting: Scales and sizes.
        out: The output folder.
        folders: Paths within ``out`` by scale (ground truth: ``GT``, degraded: ``LQ``).
        lmdbs: The same for LMDBs; None for no LMDBs.
        degrade: Makes the image under ``LQ`` from the whole photograph; must be picklable.
        min_size: Photographs with a smaller side (after the crop to ``cutting.multiple_of``) are left out.
        workers: Number of processes.
        force: Replaces existing folders.
        progress: Called with 1 after each photograph.

    Raises:
        DataError: A photograph cannot be read or has an invalid name, or none is large enough.
        OptionError: Without ``force``, a non-empty folder or a file exists; or a photograph is in a folder that
            would be replaced.
    """
    targets = [*folders.values(), *(lmdbs or {}).values()]
    check_apart([photograph.path for photograph in photographs], [out / target for target in targets])
    check_names(photographs, bool(lmdbs))
    if degrade is not None:
        targets += [PARAMETERS, SETTINGS]
    for target in targets:
        if not force and is_taken(out / target):
            raise OptionError(f"{out / target} exists already; add --force to replace it")
    with temporary_folder(out) as temporary:
        for folder in folders.values():
            (temporary / folder).mkdir(parents=True)
        here = {scale: str(temporary / folder) for scale, folder in folders.items()}
        work = partial(_write_one, cutting=cutting, folders=here, min_size=min_size, degrade=degrade)
        shapes: dict[int, dict[str, Shape]] = {scale: {} for scale in folders}
        too_small = []
        parameters = []
        for photograph, made in zip(photographs, _map_processes(work, photographs, workers), strict=True):
            for name, by_scale in made.shapes:
                for scale in folders:
                    shapes[scale][name] = by_scale[scale]
            if made.shapes:
                parameters.append({"name": photograph.name, **made.parameters})
            else:
                too_small.append(photograph.name)
            if progress is not None:
                progress(1)
        if not shapes[GT]:
            least = max(min_size, cutting.multiple_of)
            raise DataError(f"None of the {len(photographs)} images has sides of {least} pixels")
        for scale, target in (lmdbs or {}).items():
            (temporary / target).parent.mkdir(parents=True, exist_ok=True)
            write_lmdb(temporary / folders[scale], temporary / target, shapes[scale])
        if degrade is not None:
            lines = "".join(json.dumps(entry) + "\n" for entry in sorted(parameters, key=itemgetter("name")))
            (temporary / PARAMETERS).write_text(lines, encoding="utf-8")
            (temporary / SETTINGS).write_text(json.dumps(degrade.settings, indent=1) + "\n", encoding="utf-8")
        for target in targets:
            replace_folder(temporary / target, out / target)
    return Written(len(photographs) - len(too_small), len(shapes[GT]), tuple(too_small))
