"""Checks a data set's files before anything is built: existence, pairing, sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdsr.data.dataset_options import MIRRORED, PAIRED
from kdsr.data.image_files import sizes_match
from kdsr.data.image_info import ImageInfo, UnfitImage
from kdsr.data.image_losses import describe_left_out, describe_losses
from kdsr.data.image_roots import Images, listed_names, open_root, quote, result_name, same_names, spread
from kdsr.data.pair_names import why_missing
from kdsr.data.pairing import partners

Size = tuple[int, int]
_NOT_TEXT = re.compile("[\ud800-\udfff]")  # bytes of a name that are not UTF-8


@dataclass
class _Report:
    """``problems`` stop the run, ``warnings`` do not; ``skips``: unreadable images are replaced."""

    problems: list[str]
    warnings: list[str]
    training: bool
    skips: bool


def _template_fits(template: Any, problems: list[str]) -> bool:
    try:
        # the whole name: without {} all GT images would have the same partner
        fits = isinstance(template, str) and all(name in template.format(name) for name in ("name", "other"))
    except (AttributeError, IndexError, KeyError, ValueError):  # what str.format raises
        fits = False
    if not fits:
        problems.append(
            f"filename_tmpl: {template!r} must be like '{{}}x2': {{}} becomes the name of the GT image"
        )
    return fits


def _pairs(opt: Mapping[str, Any], gt: Images, lq: Images, problems: list[str]) -> list[tuple[str, str]]:
    """Pairs GT and LQ names as BasicSR does; reports those without a partner."""
    template = opt.get("filename_tmpl", "{}")
    if not _template_fits(template, problems):
        return []
    listed = listed_names(opt, problems)
    names = gt.names if listed is None else listed
    if gt.is_lmdb:
        if template != "{}":
            problems.append(
                f"filename_tmpl: {template!r} is for folders; images of LMDBs are paired by equal keys"
            )
        pairs = {name: name for name in names}
    else:
        pairs = partners(names, template, lq.root)
    _report_shared(pairs, lq, problems)
    gt_names = {*gt.names, *gt.in_folders(pairs)}
    lq_names = {*lq.names, *lq.in_folders(pairs.values())}
    if listed is not None:
        absent = [name for name in pairs if name not in gt_names]
        if absent:
            problems.append(f"meta_info_file: {gt.root} has no {quote(absent)}")
    without_lq = [partner for name, partner in pairs.items() if name in gt_names and partner not in lq_names]
    if without_lq:
        present = {name: partner for name, partner in pairs.items() if name in gt_names}
        hint = why_missing(present, lq_names, None if gt.is_lmdb else template)
        problems.append(f"dataroot_lq: {lq.root} has no {quote(without_lq)}, which {gt.root} needs{hint}")
    elif listed is None and len(lq.names) != len(gt.names):
        extra = sorted(lq_names - set(pairs.values()))
        problems.append(f"dataroot_gt: {gt.root} has no counterpart of {quote(extra)} in {lq.root}")
    return [(name, partner) for name, partner in pairs.items() if name in gt_names and partner in lq_names]


def _report_shared(pairs: Mapping[str, str], lq: Images, problems: list[str]) -> None:
    """Reports an LQ image that is paired with several GT images."""
    owners: dict[str, str] = {}
    for name, partner in pairs.items():
        if owners.setdefault(partner, name) != name:
            problems.append(
                f"dataroot_lq: {lq.shown(partner)} would be the partner of {owners[partner]} and of {name}; "
                "put the LQ images into folders like the GT images, or give them unique names"
            )
            return


def _sizes(images: Images, key: str, names: Sequence[str], report: _Report) -> list[Size | None]:
    """The sizes of images; reports unreadable images and losses in reading the others."""
    unreadable: dict[str, list[str]] = {}  # by reason, empty for damaged images
    infos: list[tuple[str, ImageInfo]] = []
    sizes: list[Size | None] = []
    for name in names:
        info, reason = None, None
        try:
            if name in images.absent:
                reason = ", which its meta_info.txt names"
            else:
                info = images.info(name)
        except OSError as error:
            reason = f": {error}" if isinstance(error, UnfitImage) else ""
        if reason is not None:
            unreadable.setdefault(reason, []).append(images.shown(name))
        if info is not None:
            infos.append((name, info))
        sizes.append(info.size if info else None)
    replaced = report.skips and sum(map(len, unreadable.values())) < len(names)
    for reason, shown in sorted(unreadable.items()):
        problem = f"{key}: cannot read image {quote(shown)}"
        if replaced:
            why = reason if reason.startswith(":") else ""
            report.warnings.append(f"{problem}{why}; on_bad_image: skip replaces them in training")
        else:
            report.problems.append(problem + reason)
    report.warnings += [
        f"{key}: {loss}" for loss in describe_losses(infos, len(images.names), not report.training)
    ]
    return sizes


def _check_left_out(images: Images, key: str, recursive: bool, report: _Report) -> None:
    left_out = describe_left_out(images.root, images.left_out, recursive)
    if left_out:
        report.warnings.append(f"{key}: {left_out}")


def _check_names(images: Images, key: str, names: Sequence[str], report: _Report) -> None:
    """Reports images whose results would have the same name, or a name that is not text."""
    if report.training:
        return
    shown = [images.shown(name) for name in names]
    paths = names if images.is_lmdb else shown
    if problem := same_names(
        (result_name(path, images.root), text) for path, text in zip(paths, shown, strict=True)
    ):
        report.problems.append(f"{key}: {problem}")
    if strange := [repr(name) for name in names if _NOT_TEXT.search(name)]:
        report.problems.append(f"{key}: {quote(strange)}: rename it, the name of a result must be UTF-8 text")


def _check_patch(
    opt: Mapping[str, Any],
    images: Images,
    names: Sequence[str],
    sizes: Sequence[Size | None],
    problems: list[str],
    scale: int = 1,
) -> None:
    size = opt.get("gt_size")
    if not isinstance(size, int) or opt.get("type") in MIRRORED:
        return
    patch = size // scale
    small = [
        (name, found)
        for name, found in zip(names, sizes, strict=True)
        if found is not None and min(found) < patch
    ]
    if small:
        (name, (height, width)), rest = small[0], len(small) - 1
        what = f"{size} is" if scale == 1 else f"{size} makes LQ patches of {patch}, which are"
        more = f" and {rest} more images" if rest else ""
        problems.append(
            f"gt_size: {what} larger than {images.shown(name)} ({height}x{width}){more}; "
            "lower it or leave such images out"
        )


def _check_pairs(opt: Mapping[str, Any], scale: int, report: _Report) -> None:
    problems, training = report.problems, report.training
    gt, lq = open_root(opt, "dataroot_gt", problems), open_root(opt, "dataroot_lq", problems)
    if gt is None or lq is None:
        return
    all_pairs = _pairs(opt, gt, lq, problems)
    _check_names(lq, "dataroot_lq", [partner for _, partner in all_pairs], report)
    if listed_names(opt, []) is None:
        _check_left_out(gt, "dataroot_gt", False, report)
        _check_left_out(lq, "dataroot_lq", False, report)
    pairs = spread(all_pairs)
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


def _check_single(opt: Mapping[str, Any], key: str, recursive: bool, report: _Report, scale: int = 1) -> None:
    problems = report.problems
    images = open_root(opt, key, problems, recursive)
    if images is None:
        return
    names = images.names
    listed = None if recursive else listed_names(opt, problems)
    if listed is not None:
        there = {*names, *images.in_folders(listed)}
        absent = [name for name in listed if name not in there]
        if absent:
            problems.append(f"meta_info_file: {images.root} has no {quote(absent)}")
        names = [name for name in listed if name in there]
    else:
        _check_left_out(images, key, recursive, report)
    _check_names(images, key, names, report)
    names = spread(names)
    sizes = _sizes(images, key, names, report)
    if report.training:
        _check_patch(opt, images, names, sizes, problems, scale)
        if opt.get("type") == "SingleImageDataset":
            _check_batch(opt, names, sizes, problems)


def _check_batch(
    opt: Mapping[str, Any], names: Sequence[str], sizes: Sequence[Size | None], problems: list[str]
) -> None:
    """Reports whole images of different sizes, which do not fit in one batch."""
    batch = opt.get("batch_size_per_gpu", 1)
    known = {size: name for name, size in zip(names, sizes, strict=True) if size is not None}
    if isinstance(batch, int) and batch > 1 and len(known) > 1:
        listed = [f"{name} is {height}x{width}" for (height, width), name in known.items()]
        problems.append(
            f"batch_size_per_gpu: SingleImageDataset loads whole images, and {listed[0]}, {listed[1]}: they do not fit "
            f"in a batch of {batch}; set 1, or use type: LQImageDataset, which cuts patches of gt_size"
        )


def _check_noise(opt: Mapping[str, Any], training: bool, problems: list[str]) -> None:
    if opt.get("in_ch") == 2:
        problems.append("in_ch: 2 is neither 3 (RGB) nor 1 (grey)")
    if not training and opt.get("sigma_test") is None:
        problems.append("sigma_test: is required")
    sigma, kind = opt.get("sigma_range"), opt.get("sigma_type")
    wanted = {"constant": "a number", "random": "two numbers", "choice": "a list of numbers"}
    shape = len(sigma) if isinstance(sigma, list) else None
    fits = {"constant": shape is None, "random": shape == 2, "choice": bool(shape)}
    if training and not fits.get(str(kind), True):
        problems.append(f"sigma_range: {sigma} must be {wanted[str(kind)]} for sigma_type: {kind}")


def check_dataset(
    opt: Mapping[str, Any], scale: int, phase: str | None = None, warnings: list[str] | None = None
) -> list[str]:
    """Checks a data set's files, reading only their headers.

    Args:
        opt: One entry of ``datasets``. Types other than those of kdsr and BasicSR's for images are not checked.
        scale: Upscaling factor of the run.
        phase: ``train``, ``val`` or ``test``; default: ``opt['phase']``.
        warnings: Warnings are appended: unreadable training images that ``on_bad_image: skip`` replaces, losses in
            reading images, and files of a folder that are not read.

    Returns:
        Problems, each beginning with the option's key (``dataroot_gt: there is no folder …``).
    """
    problems: list[str] = []
    training = (phase or opt.get("phase")) == "train"
    skips = training and opt.get("on_bad_image") == "skip"
    report = _Report(problems, [] if warnings is None else warnings, training, skips)
    kind, patch = opt.get("type"), opt.get("gt_size")
    if (
        training
        and kind in ("LQImageDataset", "ImageFolderDataset", "Dataset_GaussianDenoising")
        and patch is None
    ):
        problems.append("gt_size: is required in training")
    if training and kind in (*PAIRED, "LQImageDataset") and isinstance(patch, int) and patch % scale:
        problems.append(f"gt_size: {patch} is not a multiple of the scale {scale}")
    if kind in PAIRED:
        _check_pairs(opt, scale, report)
    elif kind == "SingleImageDataset":
        _check_single(opt, "dataroot_lq", False, report)
    elif kind == "LQImageDataset":
        _check_single(opt, "dataroot_lq", True, report, scale)
    elif kind == "Dataset_GaussianDenoising":
        _check_noise(opt, training, problems)
        _check_single(opt, "dataroot_gt", True, report)
    elif kind == "ImageFolderDataset":
        multiple = opt.get("multiple_of", 1)
        if not isinstance(multiple, int) or multiple < 1:
            problems.append(f"multiple_of: {multiple} must be a positive whole number")
        _check_single(opt, "dataroot_gt", True, report)
    return problems
