"""The sample data set: colour photographs in scikit-image's wheel, split into training and validation."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import skimage

from kdsr.data.image_files import list_images
from kdsr.prepare.pair_writer import (
    SETTINGS,
    Photograph,
    is_taken,
    replace_folder,
    temporary_folder,
    write_pairs,
)
from kdsr.prepare.sub_images import GT, LQ, Cutting
from kdsr.prepare.synthesis import Seeded
from kdsr.runtime.errors import DataError, OptionError

MANIFEST = "manifest.json"
_FORMAT = 1  # increased when the same arguments give another result


@dataclass(frozen=True)
class Source:
    """A photograph in the wheel."""

    file: str  # its name in skimage/data
    split: str  # train or val
    terms: str  # content, origin and licence, as stated by scikit-image
    window: tuple[int, int, int, int] | None = None  # top, left, height and width of the used part; None: all

    @property
    def name(self) -> str:
        return Path(self.file).stem


_MIDDLEBURY = (
    "view of a motorcycle, Middlebury 2014 stereo benchmark (Scharstein et al., GCPR 2014), down-sampled by "
    "four; scikit-image states no licence, Middlebury asks for the citation"
)
# Not used: the Hubble deep field (noise and points on black), the retina (a smooth disc on black), and drawings
# (colour wheel, chessboard, logo, horse). Both views of the motorcycle are in the same split.
SOURCES = (
    Source("astronaut.png", "train", "Eileen Collins, NASA Great Images; public domain"),
    Source("ihc.png", "train", "stained tissue under a microscope, CMMI; no known copyright restrictions"),
    Source("motorcycle_left.png", "train", f"left {_MIDDLEBURY}"),
    Source("motorcycle_right.png", "train", f"right {_MIDDLEBURY}"),
    Source("chelsea.png", "val", "Chelsea the cat, by Stefan van der Walt; CC0", (6, 33, 288, 384)),
    Source(
        "coffee.png",
        "val",
        "coffee cup, by Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0",
        (8, 100, 384, 384),
    ),
    Source("rocket.jpg", "val", "DSCOVR on a Falcon 9, by SpaceX; public domain", (20, 150, 384, 384)),
)

# Large enough for patches of 192 pixels (48 at x4); a remainder of up to 24 pixels is dropped.
TRAIN_CROP, TRAIN_STEP, TRAIN_THRESH = 240, 120, 24


def folder_names(scales: Sequence[int]) -> dict[int, str]:
    """The folders of a data set by scale: ``GT``, ``LR_x2``, …"""
    return {GT: "GT"} | {scale: f"LR_x{scale}" for scale in scales}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _contents(root: Path) -> dict[str, str]:
    unlisted = (MANIFEST, "lock.mdb")  # the latter is written by readers of the LMDB
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name not in unlisted)
    return {path.relative_to(root).as_posix(): _sha256(path) for path in files}


def _request(scales: Sequence[int], sources: Path) -> dict[str, Any]:
    """Everything that determines the result, as JSON values."""
    photographs = {
        source.file: {
            "split": source.split,
            "window": None if source.window is None else list(source.window),
            "sha256": _sha256(sources / source.file),
        }
        for source in SOURCES
    }
    cutting = {"crop": TRAIN_CROP, "step": TRAIN_STEP, "thresh": TRAIN_THRESH}
    return {"format": _FORMAT, "scales": list(scales), "train": cutting, "photographs": photographs}


def is_complete(out: Path, request: dict[str, Any]) -> bool:
    """Whether ``out`` holds exactly the files of ``request``, with the same hashes."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return manifest.get("request") == request and manifest.get("files") == _contents(out)


def _readme(scales: Sequence[int]) -> str:
    version = importlib.metadata.version("scikit-image")
    rows = []
    for source in SOURCES:
        window = "all" if source.window is None else ", ".join(map(str, source.window))
        rows.append(f"| {source.file} | {source.split} | {window} | {source.terms} |")
    return f"""# Sample data

Made by `kdsr data sample` from photographs in scikit-image {version}.
LQ images: Matlab's bicubic `imresize`, x{", x".join(map(str, scales))}. Each folder also exists as LMDB.
Training: sub-images of {TRAIN_CROP} pixels. Validation: one part of each held-out photograph.

| photograph | split | part (top, left, height, width) | origin and terms, as scikit-image states them |
|---|---|---|---|
""" + "".join(f"{row}\n" for row in rows)


def make_sample(
    out: Path, scales: Sequence[int], *, workers: int = 1, progress: Callable[[int], object] | None = None
) -> bool:
    """Writes the sample data set, unless it exists and is complete.

    ``out`` gets ``train`` and ``val``, each with ``GT``, ``LR_x2``, … and the same as LMDBs, a ``README.md`` and a
    manifest with the hash of every file. It is created atomically. ``progress`` is called with 1 after each photograph.

    Returns:
        Whether anything was written.

    Raises:
        DataError: scikit-image's files are missing.
        OptionError: ``out`` holds something else.
    """
    sources = Path(skimage.__file__).parent / "data"
    missing = [source.file for source in SOURCES if not (sources / source.file).is_file()]
    if missing:
        raise DataError(f"scikit-image has no {', '.join(missing)} in {sources}; install its wheel (0.26)")
    request = _request(scales, sources)
    if is_complete(out, request):
        return False
    if is_taken(out) and not (out / MANIFEST).is_file():
        raise OptionError(f"{out} exists and was not made by this command; choose another --out")
    multiple = math.lcm(*scales)
    cuttings = {
        "train": Cutting(tuple(scales), multiple, TRAIN_CROP, TRAIN_STEP, TRAIN_THRESH),
        "val": Cutting(tuple(scales), multiple),
    }
    names = folder_names(scales)
    lmdbs = {scale: f"{name}.lmdb" for scale, name in names.items()}
    with temporary_folder(out.parent) as temporary:
        new = temporary / out.name
        for split, cutting in cuttings.items():
            photographs = [
                Photograph(source.name, sources / source.file, source.window)
                for source in SOURCES
                if source.split == split
            ]
            write_pairs(
                photographs, cutting, new / split, names, lmdbs=lmdbs, workers=workers, progress=progress
            )
        (new / "README.md").write_text(_readme(scales), encoding="utf-8")
        manifest = {"request": request, "files": _contents(new)}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        replace_folder(new, out)
    return True


def degrade_sample(sample: Path, out: Path, degrade: Seeded) -> None:
    """Degrades each image of a data set of :func:`make_sample`, as ``kdsr data degrade`` does.

    ``out`` gets ``train`` and ``val``, each with ``GT``, ``LQ`` and the parameters. The result of an earlier call with
    the same settings is replaced; an ``OptionError`` is raised if ``out`` holds something else.
    """
    for split in ("train", "val"):
        folder = out / split
        ours = _settings(folder) == degrade.settings
        if is_taken(folder) and not ours:
            raise OptionError(f"{folder} exists and was not made with these settings; move it away")
        photographs = [Photograph(path.stem, path) for path in list_images(sample / split / "GT")]
        write_pairs(photographs, Cutting((), 1), folder, {GT: "GT", LQ: "LQ"}, degrade=degrade, force=ours)


def _settings(folder: Path) -> Any:
    """The settings of a folder's LQ images; None if unknown."""
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
