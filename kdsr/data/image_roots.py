"""The images behind one ``dataroot_*`` of the options: a folder, or an LMDB with its meta_info.txt."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basicsr.utils import scandir

from kdsr.data.image_files import image_size, list_images
from kdsr.data.lmdb_client import missing_keys
from kdsr.runtime.errors import DataError

MOST_FILES = 2000  # of a larger set as many are looked at, evenly spaced
_SHAPE = re.compile(r"\((\d+),\s*(\d+),\s*\d+\)")

Size = tuple[int, int]


@dataclass
class Images:
    """The images of one ``dataroot_*``: where they are, and how to learn a size (None: not known).

    ``absent`` are those that an LMDB's meta_info.txt names and the LMDB does not hold.
    """

    root: str
    names: list[str]
    size: Callable[[str], Size | None]
    absent: frozenset[str] = frozenset()

    def shown(self, name: str) -> str:
        return f"{self.root}: {name}" if self.root.endswith(".lmdb") else os.path.join(self.root, name)


def quote(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def spread(items: list[Any]) -> list[Any]:
    if len(items) <= MOST_FILES:
        return items
    return [items[number * len(items) // MOST_FILES] for number in range(MOST_FILES)]


def _read_lines(path: str | Path, key: str, problems: list[str]) -> list[str] | None:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        problems.append(f"{key}: cannot read {path}: {error.strerror or error}")
    except UnicodeDecodeError:
        problems.append(f"{key}: cannot read {path}: not UTF-8 text")
    return None


def _open_lmdb(key: str, root: str, problems: list[str]) -> Images | None:
    if not root.endswith(".lmdb"):
        problems.append(f"{key}: {root} must end in .lmdb for io_backend.type: lmdb")
        return None
    if not os.path.isdir(root):
        problems.append(f"{key}: there is no LMDB {root}")
        return None
    absent = [name for name in ("data.mdb", "meta_info.txt") if not os.path.isfile(os.path.join(root, name))]
    if absent:
        problems.append(f"{key}: the LMDB {root} has no {' and no '.join(absent)}; make it anew")
        return None
    lines = _read_lines(Path(root, "meta_info.txt"), key, problems)
    if lines is None:
        return None
    sizes: dict[str, Size | None] = {}
    for number, line in enumerate(lines, 1):
        name, dot, _ = line.partition(".")  # BasicSR's key: all before the first dot
        if not dot:
            problems.append(
                f"{key}: line {number} of {root}/meta_info.txt names no image: a line is like"
                " 'NAME.png (HEIGHT,WIDTH,3) 1'"
            )
            return None
        shape = _SHAPE.search(line)
        sizes[name] = (int(shape[1]), int(shape[2])) if shape else None
    if not sizes:
        problems.append(f"{key}: the LMDB {root} is empty")
        return None
    try:
        absent = missing_keys(root, spread(list(sizes)))
    except DataError as error:
        problems += [f"{key}: {problem}" for problem in error.problems]
        return None
    return Images(root, list(sizes), sizes.__getitem__, frozenset(absent))


def _open_folder(key: str, root: str, problems: list[str], recursive: bool = False) -> Images | None:
    if not os.path.isdir(root):
        problems.append(f"{key}: there is no folder {root}")
        return None
    if root.rstrip("/").endswith(".lmdb"):
        problems.append(f"{key}: {root} is an LMDB; set io_backend.type: lmdb")
        return None
    try:
        names = (
            [str(path.relative_to(root)) for path in list_images(root)] if recursive else list(scandir(root))
        )
    except DataError:
        names = []
    if not names:
        problems.append(f"{key}: there is no image in {root}")
        return None
    return Images(root, sorted(names), lambda name: image_size(os.path.join(root, name)))


def open_root(
    opt: Mapping[str, Any], key: str, problems: list[str], recursive: bool = False
) -> Images | None:
    root = opt.get(key)
    if not isinstance(root, str):
        return None
    backend = (opt.get("io_backend") or {}).get("type")
    if backend is None:
        backend = "lmdb" if root.endswith(".lmdb") else "disk"
    return (
        _open_lmdb(key, root, problems) if backend == "lmdb" else _open_folder(key, root, problems, recursive)
    )


def listed_names(opt: Mapping[str, Any], problems: list[str]) -> list[str] | None:
    """The names in ``meta_info_file``; None where the folder is scanned."""
    listing = opt.get("meta_info_file")
    if not isinstance(listing, str) or (opt.get("io_backend") or {}).get("type") == "lmdb":
        return None
    lines = _read_lines(listing, "meta_info_file", problems)
    if lines is None:
        return None
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty and len(empty) < len(lines):
        problems.append(f"meta_info_file: line {empty[0]} of {listing} names no image")
    names = [line.split(" ")[0] for line in lines if line.strip()]
    if not names:
        problems.append(f"meta_info_file: {listing} names no image")
    return names
