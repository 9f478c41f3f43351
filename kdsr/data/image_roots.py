"""The images of one ``dataroot_*`` option: a folder, or an LMDB with its meta_info.txt."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdsr.data.image_files import list_folder
from kdsr.data.image_info import ImageInfo, UnfitImage, probe, probe_on_disk
from kdsr.data.lmdb_client import first_bytes
from kdsr.data.pairing import lmdb_key, names_in_list
from kdsr.runtime.errors import DataError

MOST_FILES = 2000  # larger data sets are sampled at even spacing
_SHAPE = re.compile(r"\((\d+),\s*(\d+),\s*(\d+)\)")
_HEADER = 4096  # bytes of an LMDB's value that are read; most headers are shorter


@dataclass
class Images:
    """The images of one ``dataroot_*``."""

    root: str  # the folder or LMDB
    names: list[str]  # paths below it, or keys
    info: Callable[[str], ImageInfo | None]  # reads the header of an image; None if it cannot be read
    absent: frozenset[str] = frozenset()  # names in an LMDB's meta_info.txt without an entry in the LMDB
    left_out: Sequence[str] = ()  # entries of the folder that the data set does not read

    @property
    def is_lmdb(self) -> bool:
        return self.root.endswith(".lmdb")

    def in_folders(self, names: Iterable[str]) -> list[str]:
        """The names that exist in subfolders, which ``names`` does not include."""
        if self.is_lmdb:
            return []
        return [name for name in names if "/" in name and os.path.isfile(os.path.join(self.root, name))]

    def shown(self, name: str) -> str:
        return f"{self.root}: {name}" if self.is_lmdb else os.path.join(self.root, name)


def quote(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def spread(items: list[Any]) -> list[Any]:
    if len(items) <= MOST_FILES:
        return items
    return [items[number * len(items) // MOST_FILES] for number in range(MOST_FILES)]


def _read_lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path}: not UTF-8 text") from error


def _open_lmdb(root: str) -> Images:
    if not root.endswith(".lmdb"):
        raise DataError(f"{root} must end in .lmdb for io_backend.type: lmdb")
    if not os.path.isdir(root):
        raise DataError(f"there is no LMDB {root}")
    absent = [name for name in ("data.mdb", "meta_info.txt") if not os.path.isfile(os.path.join(root, name))]
    if absent:
        raise DataError(f"the LMDB {root} has no {' and no '.join(absent)}; create it again")
    stated: dict[str, ImageInfo | None] = {}
    for number, line in enumerate(_read_lines(Path(root, "meta_info.txt")), 1):
        name, dot, _ = line.partition(".")  # BasicSR's key: all before the first dot
        if not dot:
            raise DataError(
                f"line {number} of {root}/meta_info.txt names no image; expected 'NAME.png (HEIGHT,WIDTH,3) 1'"
            )
        shape = _SHAPE.search(line)
        stated[name] = ImageInfo(int(shape[1]), int(shape[2]), int(shape[3]), 8, 255) if shape else None
    if not stated:
        raise DataError(f"the LMDB {root} is empty")
    headers = first_bytes(root, spread(list(stated)), _HEADER)

    def info(name: str) -> ImageInfo | None:
        try:
            return probe(headers.get(name) or b"")
        except UnfitImage:
            raise
        except OSError:  # longer than _HEADER, or damaged: decoding will show it
            return stated[name]

    missing = frozenset(name for name, header in headers.items() if header is None)
    return Images(root, list(stated), info, missing)


def _open_folder(root: str, recursive: bool, listed: bool) -> Images:
    if not os.path.isdir(root):
        raise DataError(f"there is no folder {root}")
    if root.rstrip("/").endswith(".lmdb"):
        raise DataError(f"{root} is an LMDB; set io_backend.type: lmdb")
    listing = list_folder(root, recursive)
    if not listing.images and not listed:  # listed images may all be in subfolders
        raise DataError(f"there is no image in {root}")
    return Images(
        root, listing.images, lambda name: probe_on_disk(os.path.join(root, name)), left_out=listing.left_out
    )


def open_root(
    opt: Mapping[str, Any], key: str, problems: list[str], recursive: bool = False
) -> Images | None:
    """The images of an option ``dataroot_*``; None, with the reason appended to ``problems``, if there are none."""
    root = opt.get(key)
    if not isinstance(root, str):
        return None
    backend = (opt.get("io_backend") or {}).get("type")
    if backend is None:
        backend = "lmdb" if root.endswith(".lmdb") else "disk"
    listed = not recursive and isinstance(opt.get("meta_info_file"), str)
    try:
        return _open_lmdb(root) if backend == "lmdb" else _open_folder(root, recursive, listed)
    except DataError as error:
        problems += [f"{key}: {problem}" for problem in error.problems]
        return None


def listed_names(opt: Mapping[str, Any], problems: list[str]) -> list[str] | None:
    """The names in ``meta_info_file`` (for an LMDB the keys); None without that option."""
    listing = opt.get("meta_info_file")
    if not isinstance(listing, str):
        return None
    try:
        lines = _read_lines(listing)
    except DataError as error:
        problems.append(f"meta_info_file: {error}")
        return None
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty and len(empty) < len(lines):
        problems.append(f"meta_info_file: line {empty[0]} of {listing} names no image")
    names = names_in_list(lines)
    if not names:
        problems.append(f"meta_info_file: {listing} names no image")
    in_lmdb = (opt.get("io_backend") or {}).get("type") == "lmdb"
    return list(map(lmdb_key, names)) if in_lmdb else names


def result_name(path: str, root: str | None) -> str:
    """The name of an image's results: its path below the data root, or its LMDB key, without extension.

    ``root`` is ``dataroot_*`` of its data set. For a file outside it, only the file name is used.
    """
    root = os.path.expanduser(root) if root else ""
    begin = f"{root.rstrip('/')}/"
    if root.endswith(".lmdb"):
        below = path
    elif root and path.startswith(begin) and os.pardir not in path:
        below = path[len(begin) :]
    else:
        below = os.path.relpath(path, root) if root else os.pardir
        if below.split(os.sep)[0] == os.pardir:
            below = os.path.basename(path)
    parts = [part for part in below.split(os.sep) if part not in ("", os.curdir, os.pardir)]
    *folders, name = parts or ["image"]
    return "/".join([*folders, os.path.splitext(name)[0]])


def same_names(named: Iterable[tuple[str, str]]) -> str | None:
    """The problem of images whose results would overwrite each other, given as (result, name in messages); or None."""
    first: dict[str, str] = {}
    for name, shown in named:
        if name in first:
            again = "twice" if first[name] == shown else f"and {shown}"
            return f"{first[name]} {again}: results of both would be called {name}; rename or remove one"
        first[name] = shown
    return None
