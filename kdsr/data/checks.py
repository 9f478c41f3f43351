"""Looks at a data set's files before anything is built: are they there, do they pair, do their sizes fit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basicsr.utils import scandir
from PIL import Image

from kdsr.data.image_files import image_size, list_images, sizes_match
from kdsr.runtime.errors import DataError

MOST_FILES = 2000  # of a larger folder as many are opened, evenly spaced
_SHAPE = re.compile(r"\((\d+),\s*(\d+),\s*\d+\)")

Size = tuple[int, int]


@dataclass
class _Images:
    """The images of one ``dataroot_*``: where they are, and how to learn a size (None: not known)."""

    root: str
    names: list[str]
    size: Callable[[str], Size | None]

    def shown(self, name: str) -> str:
        return f"{self.root}: {name}" if self.root.endswith(".lmdb") else os.path.join(self.root, name)


def _quote(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_lines(path: str | Path, key: str, problems: list[str]) -> list[str] | None:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        problems.append(f"{key}: cannot read {path}: {error.strerror or error}")
    except UnicodeDecodeError:
        problems.append(f"{key}: cannot read {path}: not UTF-8 text")
    return None


def _open_lmdb(key: str, root: str, problems: list[str]) -> _Images | None:
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
    for line in filter(None, lines):
        shape = _SHAPE.search(line)
        # BasicSR's key: all before the first dot
        sizes[line.split(".")[0]] = (int(shape[1]), int(shape[2])) if shape else None
    if not sizes:
        problems.append(f"{key}: the LMDB {root} is empty")
        return None
    return _Images(root, list(sizes), sizes.__getitem__)


def _open_folder(key: str, root: str, problems: list[str], recursive: bool = False) -> _Images | None:
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
    return _Images(root, sorted(names), lambda name: image_size(os.path.join(root, name)))


def _open(opt: Mapping[str, Any], key: str, problems: list[str], recursive: bool = False) -> _Images | None:
    root = opt.get(key)
    if not isinstance(root, str):
        return None
    backend = (opt.get("io_backend") or {}).get("type")
    if backend is None:
        backend = "lmdb" if root.endswith(".lmdb") else "disk"
    return (
        _open_lmdb(key, root, problems) if backend == "lmdb" else _open_folder(key, root, problems, recursive)
    )


def _listed(opt: Mapping[str, Any], problems: list[str]) -> list[str] | None:
    """The names in ``meta_info_file``; None where the folder is scanned."""
    listing = opt.get("meta_info_file")
    if not isinstance(listing, str) or (opt.get("io_backend") or {}).get("type") == "lmdb":
        return None
    lines = _read_lines(listing, "meta_info_file", problems)
    if lines is None:
        return None
    names = [line.split(" ")[0] for line in lines if line.strip()]
    if not names:
        problems.append(f"meta_info_file: {listing} names no image")
    return names


def _template_fits(template: Any, problems: list[str]) -> bool:
    try:
        fits = isinstance(template, str) and bool(template.format("name"))
    except (AttributeError, IndexError, KeyError, ValueError):  # what str.format raises
        fits = False
    if not fits:
        problems.append(
            f"filename_tmpl: {template!r} must be like '{{}}x2': {{}} becomes the name of the GT image"
        )
    return fits


def _pairs(opt: Mapping[str, Any], gt: _Images, lq: _Images, problems: list[str]) -> list[tuple[str, str]]:
    """GT and LQ names as BasicSR pairs them; reports those without a partner."""
    if gt.root.endswith(".lmdb"):
        partners = {name: name for name in gt.names}
        listed = None
    else:
        listed = _listed(opt, problems)
        template = opt.get("filename_tmpl", "{}")
        if not _template_fits(template, problems):
            return []
        names = gt.names if listed is None else listed
        parts = {name: os.path.splitext(os.path.basename(name)) for name in names}
        partners = {name: f"{template.format(stem)}{ending}" for name, (stem, ending) in parts.items()}
    gt_names, lq_names = set(gt.names), set(lq.names)
    if listed is not None:
        absent = [name for name in partners if name not in gt_names]
        if absent:
            problems.append(f"meta_info_file: {gt.root} has no {_quote(absent)}")
    widowed = [partner for name, partner in partners.items() if name in gt_names and partner not in lq_names]
    if widowed:
        problems.append(f"dataroot_lq: {lq.root} has no {_quote(widowed)}, which {gt.root} asks for")
    elif listed is None and len(lq.names) != len(gt.names):
        extra = sorted(lq_names - set(partners.values()))
        problems.append(f"dataroot_gt: {gt.root} has no counterpart of {_quote(extra)} in {lq.root}")
    return [(name, partner) for name, partner in partners.items() if name in gt_names and partner in lq_names]


def _spread(items: list[Any]) -> list[Any]:
    if len(items) <= MOST_FILES:
        return items
    return [items[number * len(items) // MOST_FILES] for number in range(MOST_FILES)]


def _sizes(images: _Images, key: str, names: Sequence[str], problems: list[str]) -> list[Size | None]:
    unreadable, sizes = [], []
    for name in names:
        try:
            sizes.append(images.size(name))
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ):  # Pillow's for a broken header
            unreadable.append(images.shown(name))
            sizes.append(None)
    if unreadable:
        problems.append(f"{key}: cannot read image {_quote(unreadable)}")
    return sizes


def _check_patch(
    opt: Mapping[str, Any],
    images: _Images,
    names: Sequence[str],
    sizes: Sequence[Size | None],
    problems: list[str],
) -> None:
    patch = opt.get("gt_size")
    if not isinstance(patch, int):
        return
    small = [
        (name, size)
        for name, size in zip(names, sizes, strict=True)
        if size is not None and min(size) < patch
    ]
    if small:
        (name, size), rest = small[0], len(small) - 1
        more = f" and {rest} more images" if rest else ""
        problems.append(
            f"gt_size: {patch} is larger than {images.shown(name)} ({size[0]}x{size[1]}){more}; "
            "lower it or leave such images out"
        )


def _check_pairs(opt: Mapping[str, Any], scale: int, training: bool, problems: list[str]) -> None:
    gt, lq = _open(opt, "dataroot_gt", problems), _open(opt, "dataroot_lq", problems)
    patch = opt.get("gt_size")
    if training and isinstance(patch, int) and patch % scale:
        problems.append(f"gt_size: {patch} is not a multiple of the scale {scale}")
    if gt is None or lq is None:
        return
    pairs = _spread(_pairs(opt, gt, lq, problems))
    gt_sizes = _sizes(gt, "dataroot_gt", [pair[0] for pair in pairs], problems)
    lq_sizes = _sizes(lq, "dataroot_lq", [pair[1] for pair in pairs], problems)
    wrong = [
        (pair, big, small)
        for pair, big, small in zip(pairs, gt_sizes, lq_sizes, strict=True)
        if big and small and not sizes_match(big, small, scale, allow_remainder=not training)
    ]
    if wrong:
        (name, partner), big, small = wrong[0]
        more = f"; {len(wrong) - 1} more pairs do not either" if len(wrong) > 1 else ""
        problems.append(
            f"dataroot_lq: {lq.shown(partner)} ({small[0]}x{small[1]}) and {gt.shown(name)} "
            f"({big[0]}x{big[1]}) do not match scale {scale}{more}"
        )
    elif training:
        _check_patch(opt, gt, [pair[0] for pair in pairs], gt_sizes, problems)


def _check_single(
    opt: Mapping[str, Any], key: str, training: bool, recursive: bool, problems: list[str]
) -> None:
    images = _open(opt, key, problems, recursive)
    if images is None:
        return
    names = images.names
    listed = None if recursive else _listed(opt, problems)
    if listed is not None:
        there = set(names)
        absent = [name for name in listed if name not in there]
        if absent:
            problems.append(f"meta_info_file: {images.root} has no {_quote(absent)}")
        names = [name for name in listed if name in there]
    names = _spread(names)
    sizes = _sizes(images, key, names, problems)
    if training:
        _check_patch(opt, images, names, sizes, problems)


def check_dataset(opt: Mapping[str, Any], scale: int, phase: str | None = None) -> list[str]:
    """Finds what is wrong with a data set's files, by reading their headers only.

    Args:
        opt: One entry of ``datasets``. Types other than PairedImageDataset, SingleImageDataset and
            ImageFolderDataset are not judged.
        scale: Upscaling factor of the run.
        phase: ``train``, ``val`` or ``test``; ``opt['phase']`` unless given.

    Returns:
        Problems, each beginning with the option's key (``dataroot_gt: there is no folder …``); none if all is
        well.
    """
    problems: list[str] = []
    training = (phase or opt.get("phase")) == "train"
    kind = opt.get("type")
    if kind == "PairedImageDataset":
        _check_pairs(opt, scale, training, problems)
    elif kind == "SingleImageDataset":
        _check_single(opt, "dataroot_lq", training, False, problems)
    elif kind == "ImageFolderDataset":
        if training and opt.get("gt_size") is None:
            problems.append("gt_size: is required in training")
        multiple = opt.get("multiple_of", 1)
        if not isinstance(multiple, int) or multiple < 1:
            problems.append(f"multiple_of: {multiple} must be a whole number from 1 on")
        _check_single(opt, "dataroot_gt", training, True, problems)
    return problems
