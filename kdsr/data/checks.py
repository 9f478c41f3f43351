"""Looks at a data set's files before anything is built: are they there, do they pair, do their sizes fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kdsr.data.image_files import sizes_match
from kdsr.data.image_roots import Images, Size, listed_names, open_root, quote, spread
from kdsr.data.pair_names import why_missing


@dataclass
class _Report:
    """What is found: ``problems`` stop the run, ``warnings`` do not; ``skips``: unreadable images are replaced."""

    problems: list[str]
    warnings: list[str]
    skips: bool


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


def _pairs(opt: Mapping[str, Any], gt: Images, lq: Images, problems: list[str]) -> list[tuple[str, str]]:
    """GT and LQ names as BasicSR pairs them; reports those without a partner."""
    if gt.root.endswith(".lmdb"):
        partners = {name: name for name in gt.names}
        listed = None
    else:
        listed = listed_names(opt, problems)
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
            problems.append(f"meta_info_file: {gt.root} has no {quote(absent)}")
    widowed = [partner for name, partner in partners.items() if name in gt_names and partner not in lq_names]
    if widowed:
        hint = why_missing(
            {name: partner for name, partner in partners.items() if name in gt_names},
            lq_names,
            None if gt.root.endswith(".lmdb") else opt.get("filename_tmpl", "{}"),
        )
        problems.append(f"dataroot_lq: {lq.root} has no {quote(widowed)}, which {gt.root} asks for{hint}")
    elif listed is None and len(lq.names) != len(gt.names):
        extra = sorted(lq_names - set(partners.values()))
        problems.append(f"dataroot_gt: {gt.root} has no counterpart of {quote(extra)} in {lq.root}")
    return [(name, partner) for name, partner in partners.items() if name in gt_names and partner in lq_names]


def _sizes(images: Images, key: str, names: Sequence[str], report: _Report) -> list[Size | None]:
    unreadable, sizes = [], []
    for name in names:
        try:
            sizes.append(None if name in images.absent else images.size(name))
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ):  # Pillow's for a broken header
            unreadable.append(images.shown(name))
            sizes.append(None)
    unreadable += [images.shown(name) for name in names if name in images.absent]
    if unreadable and report.skips and len(unreadable) < len(names):
        report.warnings.append(
            f"{key}: cannot read image {quote(unreadable)}; on_bad_image: skip replaces them in training"
        )
    elif unreadable:
        why = ", which its meta_info.txt names" if images.absent else ""
        report.problems.append(f"{key}: cannot read image {quote(unreadable)}{why}")
    return sizes


def _check_patch(
    opt: Mapping[str, Any],
    images: Images,
    names: Sequence[str],
    sizes: Sequence[Size | None],
    problems: list[str],
    scale: int = 1,
) -> None:
    size = opt.get("gt_size")
    if not isinstance(size, int):
        return
    patch = size // scale
    small = [
        (name, found)
        for name, found in zip(names, sizes, strict=True)
        if found is not None and min(found) < patch
    ]
    if small:
        (name, (height, width)), rest = small[0], len(small) - 1
        said = f"{size} is" if scale == 1 else f"{size} makes LQ patches of {patch}, which are"
        more = f" and {rest} more images" if rest else ""
        problems.append(
            f"gt_size: {said} larger than {images.shown(name)} ({height}x{width}){more}; "
            "lower it or leave such images out"
        )


def _check_pairs(opt: Mapping[str, Any], scale: int, training: bool, report: _Report) -> None:
    problems = report.problems
    gt, lq = open_root(opt, "dataroot_gt", problems), open_root(opt, "dataroot_lq", problems)
    patch = opt.get("gt_size")
    if training and isinstance(patch, int) and patch % scale:
        problems.append(f"gt_size: {patch} is not a multiple of the scale {scale}")
    if gt is None or lq is None:
        return
    pairs = spread(_pairs(opt, gt, lq, problems))
    gt_sizes = _sizes(gt, "dataroot_gt", [pair[0] for pair in pairs], report)
    lq_sizes = _sizes(lq, "dataroot_lq", [pair[1] for pair in pairs], report)
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
    opt: Mapping[str, Any], key: str, training: bool, recursive: bool, report: _Report, scale: int = 1
) -> None:
    problems = report.problems
    images = open_root(opt, key, problems, recursive)
    if images is None:
        return
    names = images.names
    listed = None if recursive else listed_names(opt, problems)
    if listed is not None:
        there = set(names)
        absent = [name for name in listed if name not in there]
        if absent:
            problems.append(f"meta_info_file: {images.root} has no {quote(absent)}")
        names = [name for name in listed if name in there]
    names = spread(names)
    sizes = _sizes(images, key, names, report)
    if training:
        _check_patch(opt, images, names, sizes, problems, scale)
        if opt.get("type") == "SingleImageDataset":
            _check_batch(opt, names, sizes, problems)


def _check_batch(
    opt: Mapping[str, Any], names: Sequence[str], sizes: Sequence[Size | None], problems: list[str]
) -> None:
    """Whole images make a batch only where they are of one size."""
    batch = opt.get("batch_size_per_gpu", 1)
    known = {size: name for name, size in zip(names, sizes, strict=True) if size is not None}
    if isinstance(batch, int) and batch > 1 and len(known) > 1:
        listed = [f"{name} is {height}x{width}" for (height, width), name in known.items()]
        problems.append(
            f"batch_size_per_gpu: SingleImageDataset gives whole images, and {listed[0]}, {listed[1]}: they make no "
            f"batch of {batch}; set 1, or take type: LQImageDataset, which cuts patches of gt_size"
        )


def _require_patch(opt: Mapping[str, Any], training: bool, problems: list[str]) -> None:
    if training and opt.get("gt_size") is None:
        problems.append("gt_size: is required in training")


def check_dataset(
    opt: Mapping[str, Any], scale: int, phase: str | None = None, warnings: list[str] | None = None
) -> list[str]:
    """Finds what is wrong with a data set's files, by reading their headers only.

    Args:
        opt: One entry of ``datasets``. Types other than PairedImageDataset, SingleImageDataset, ImageFolderDataset
            and LQImageDataset are not judged.
        scale: Upscaling factor of the run.
        phase: ``train``, ``val`` or ``test``; ``opt['phase']`` unless given.
        warnings: Gets what does not stop the run: unreadable training images that ``on_bad_image: skip`` replaces,
            as long as there is a readable one.

    Returns:
        Problems, each beginning with the option's key (``dataroot_gt: there is no folder …``); none if all is
        well.
    """
    problems: list[str] = []
    training = (phase or opt.get("phase")) == "train"
    skips = training and opt.get("on_bad_image") == "skip"
    report = _Report(problems, [] if warnings is None else warnings, skips)
    kind = opt.get("type")
    if kind == "PairedImageDataset":
        _check_pairs(opt, scale, training, report)
    elif kind == "SingleImageDataset":
        _check_single(opt, "dataroot_lq", training, False, report)
    elif kind == "LQImageDataset":
        _require_patch(opt, training, problems)
        if training and isinstance(opt.get("gt_size"), int) and opt["gt_size"] % scale:
            problems.append(f"gt_size: {opt['gt_size']} is not a multiple of the scale {scale}")
        _check_single(opt, "dataroot_lq", training, True, report, scale)
    elif kind == "ImageFolderDataset":
        _require_patch(opt, training, problems)
        multiple = opt.get("multiple_of", 1)
        if not isinstance(multiple, int) or multiple < 1:
            problems.append(f"multiple_of: {multiple} must be a whole number from 1 on")
        _check_single(opt, "dataroot_gt", training, True, report)
    return problems
