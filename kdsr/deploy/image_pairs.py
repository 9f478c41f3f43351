"""The images of a distillation: finds and pairs them, holds some out, and writes them as a data set."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdsr.data.image_files import cannot_read, decode_pixels, list_images, sizes_match
from kdsr.data.image_info import probe
from kdsr.data.resize import imresize, mod_crop
from kdsr.prepare.pair_writer import Photograph, replace_folder, temporary_folder, write_pairs
from kdsr.prepare.sub_images import GT, Cutting, encode_png
from kdsr.runtime.errors import DataError, OptionError

Image = NDArray[np.uint8]
LQ_FOLDER, GT_FOLDER, TEACHER_FOLDER = "LQ", "GT", "teacher"
_SHARE, _MOST = 10, 10  # one image in ten is held out, at most ten
_CROP = 480  # side of sub-images, and the largest of a held-out image that is cut out of a photograph
_SUB_IMAGE = re.compile(r"_s\d{3,}$")  # ending of the names of sub-images of one photograph


class Pair(NamedTuple):
    """The files of an image; None for what is not given."""

    lq: Path | None
    gt: Path | None

    @property
    def file(self) -> Path:
        found = self.gt or self.lq
        assert found is not None
        return found


@dataclass(frozen=True)
class Images:
    """The images of a distillation.

    Attributes:
        train: To train on.
        val: Held out.
        scale: Upscaling factor.
        has_gt: Whether there is ground truth; otherwise the student learns from the teacher's output alone.
        made: Whether the LQ images are made from the ground truth.
        left_out: Images that are smaller than a training patch.
    """

    train: list[Pair]
    val: list[Pair]
    scale: int
    has_gt: bool
    made: bool
    left_out: list[Path]


def find(
    images: Path | None, gt: Path | None, lq: Path | None, no_gt: bool, *, scale: int, patch: int
) -> Images:
    """Finds the images, pairs them and holds some out.

    Args:
        images: Photographs: ground truth for scales above 1, else LQ images; with ``no_gt`` LQ images in any case.
        gt: Ground truth, beside ``lq``.
        lq: LQ images.
        no_gt: Whether to do without ground truth.
        scale: Upscaling factor.
        patch: Side of the training patches, in pixels of the ground truth.

    Raises:
        OptionError: Folders are missing, empty, do not fit together, or have no image of the size of a patch.
    """
    given = [name for name, value in {"--images": images, "--gt": gt, "--lq": lq}.items() if value]
    if given not in (["--images"], ["--lq"], ["--gt", "--lq"]) or (gt and no_gt):
        raise OptionError(
            f"{' '.join(given) or 'images'}: give --images FOLDER, or --gt FOLDER and --lq FOLDER, or --lq FOLDER "
            "alone to learn from the teacher's output only"
        )
    made = images is not None and scale > 1 and not no_gt
    try:
        if gt and lq:
            pairs = _paired(list_images(gt), list_images(lq), scale)
        elif made:
            pairs = [Pair(None, file) for file in list_images(images or "")]
        else:
            pairs = [Pair(file, None) for file in list_images(images or lq or "")]
        fitting, small = _by_size(pairs, scale, patch)
    except DataError as error:
        raise OptionError([f"{' '.join(given)}: {problem}" for problem in error.problems]) from error
    train, val = hold_out(fitting)
    if not train:
        what = f"{len(pairs)} images, {len(small)} of them smaller than a training patch ({patch}×{patch} pixels)"
        raise OptionError(
            f"{' '.join(given)}: {what}; two that do not show the same are needed, one to train on and one to measure"
        )
    return Images(train, val, scale, made or bool(gt), made, small)


def _by_size(pairs: Sequence[Pair], scale: int, patch: int) -> tuple[list[Pair], list[Path]]:
    """The pairs that have room for a patch, and the files of the others.

    Raises:
        DataError: An image cannot be read, or a pair does not fit the scale.
    """
    fitting: list[Pair] = []
    small: list[Path] = []
    for pair in pairs:
        sizes = []
        for file in filter(None, pair):
            try:
                info = probe(file)
            except OSError as error:
                raise DataError(f"Cannot read image {file}: {error}") from error
            sizes.append((info.height, info.width))
        if pair.lq and pair.gt and not sizes_match(sizes[1], sizes[0], scale, allow_remainder=False):
            (height, width), (h, w) = sizes[1], sizes[0]
            raise DataError(
                f"{pair.gt} has {width}×{height} pixels and {pair.lq} {w}×{h}; the teacher's scale is {scale}"
            )
        wanted = patch if pair.gt else patch // scale
        if min(sizes[-1]) >= wanted:
            fitting.append(pair)
        else:
            small.append(pair.file)
    return fitting, small


def _paired(gt: Sequence[Path], lq: Sequence[Path], scale: int) -> list[Pair]:
    """Pairs by equal stems, or LQ stems that end in x and the scale; raises a ``DataError`` for others."""
    by_stem = {file.stem.removesuffix(f"x{scale}"): file for file in lq} | {file.stem: file for file in lq}
    alone = [file for file in gt if file.stem not in by_stem]
    if alone or len(gt) != len(lq):
        what = (
            f"{alone[0]} has no LQ image of its name"
            if alone
            else f"{len(gt)} images in --gt, {len(lq)} in --lq"
        )
        raise DataError(f"{what}; both folders need the same names")
    return [Pair(by_stem[file.stem], file) for file in gt]


def hold_out(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out images: every tenth is held out, at least one and at most ten.

    Files with the same bytes, and sub-images of one photograph (``NAME_s001.png``), are not separated.
    """
    groups: dict[str, list[Pair]] = {}
    digests: dict[str, str] = {}
    for pair in sorted(pairs, key=lambda pair: str(pair.file)):
        key = str(pair.file.with_name(_SUB_IMAGE.sub("", pair.file.stem)))
        with pair.file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        key = digests.setdefault(digest, key)
        groups.setdefault(key, []).append(pair)
    if len(groups) < 2:
        return [], list(pairs)
    number = min(max(len(groups) // _SHARE, 1), _MOST)
    chosen = {round((index + 0.5) * len(groups) / number) for index in range(number)}
    chosen = {min(index, len(groups) - 1) for index in chosen}
    train: list[Pair] = []
    val: list[Pair] = []
    for index, group in enumerate(groups.values()):
        (val if index in chosen else train).extend(group)
    return train, val


def write(
    images: Images,
    folder: Path,
    restore: Callable[[Image], Image],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes ``train`` and ``val`` with folders ``GT`` and ``LQ`` into a folder, which is replaced as a whole.

    LQ images are made with Matlab's bicubic; images that are given are linked. Without ground truth held-out images
    have the teacher's output in its place (``teacher``).

    Args:
        images: See ``find``.
        folder: The data set's.
        restore: The teacher, on a BGR image of 8 bits.
        progress: Called with 1 after each image.

    Raises:
        OptionError: An image cannot be used.
    """
    try:
        with temporary_folder(folder.parent) as temporary:
            for part, pairs in (("train", images.train), ("val", images.val)):
                if images.made:
                    _degrade(pairs, temporary / "data" / part, images.scale, part == "val", progress)
                else:
                    _link(pairs, temporary / "data" / part)
            if not images.has_gt:
                _restore(temporary / "data/val", restore)
            replace_folder(temporary / "data", folder)
    except DataError as error:
        raise OptionError(error.problems) from error


def _names(files: Sequence[Path]) -> list[str]:
    """Different names without endings, for files of several folders."""
    root = os.path.commonpath([file.parent for file in files])
    names = ["_".join(file.relative_to(root).with_suffix("").parts) for file in files]
    same = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return [
        f"{name}_{file.suffix[1:]}" if name in same else name for name, file in zip(names, files, strict=True)
    ]


def _degrade(
    pairs: Sequence[Pair], folder: Path, scale: int, held_out: bool, progress: Callable[[int], object] | None
) -> None:
    files = [pair.file for pair in pairs]
    crop = _CROP // scale * scale
    photographs = [
        Photograph(name, file, _centre(file, crop) if held_out else None)
        for name, file in zip(_names(files), files, strict=True)
    ]
    cutting = Cutting((scale,), scale, 0 if held_out else crop)
    write_pairs(photographs, cutting, folder, {GT: GT_FOLDER, scale: LQ_FOLDER}, progress=progress)


def _centre(file: Path, side: int) -> tuple[int, int, int, int]:
    info = probe(file)
    height, width = min(info.height, side), min(info.width, side)
    return (info.height - height) // 2, (info.width - width) // 2, height, width


def _link(pairs: Sequence[Pair], folder: Path) -> None:
    for pair, name in zip(pairs, _names([pair.file for pair in pairs]), strict=True):
        for file, place in ((pair.lq, LQ_FOLDER), (pair.gt, GT_FOLDER)):
            if file is not None:
                (folder / place).mkdir(parents=True, exist_ok=True)
                # BasicSR pairs equal names; decoding does not depend on the ending
                (folder / place / f"{name}{pair.file.suffix}").symlink_to(file.resolve())


def _restore(folder: Path, restore: Callable[[Image], Image]) -> None:
    (folder / TEACHER_FOLDER).mkdir()
    for file in sorted((folder / LQ_FOLDER).iterdir()):
        # a PNG, whatever the ending: pairs have equal names
        (folder / TEACHER_FOLDER / file.name).write_bytes(encode_png(restore(read_bgr(file))))


def samples(images: Images, side: int = 48, number: int = 4) -> list[tuple[Image, Image | None]]:
    """Centres of some training images, LQ of at most ``side`` pixels and ground truth: 8 bits, BGR."""
    found: list[tuple[Image, Image | None]] = []
    for pair in images.train[:: -(-len(images.train) // number)]:
        if pair.lq is None:
            gt = _centre_of(mod_crop(read_bgr(pair.file), images.scale), side * images.scale, 1)
            found.append((imresize(gt, 1 / images.scale), gt))
        else:
            lq = _centre_of(read_bgr(pair.lq), side, 1)
            found.append((lq, None if pair.gt is None else _centre_of(read_bgr(pair.gt), side, images.scale)))
    return found


def _centre_of(image: Image, side: int, scale: int) -> Image:
    """The middle ``side`` pixels of an image, or of one that is ``scale`` times as large the same part."""
    (top, height), (left, width) = (
        (max(length // scale - side, 0) // 2 * scale, min(length // scale, side) * scale)
        for length in image.shape[:2]
    )
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def read_bgr(file: Path) -> Image:
    """An image of any depth as 8 bits, BGR; raises a ``DataError`` if it cannot be read."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise cannot_read(str(file), error) from error
    pixels = decode_pixels(content, str(file))
    return np.rint(pixels.as_float() * 255).astype(np.uint8)
