"""Benchmarks: where the images of a set are, how papers measure them, and what they report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from kdsr.data.image_files import Pixels, list_folder, sizes_match
from kdsr.data.image_roots import quote
from kdsr.data.patches import as_tensors
from kdsr.data.resize import imresize, mod_crop
from kdsr.deploy.pictures import read_picture
from kdsr.options.files import parse_yaml
from kdsr.runtime.errors import DataError, OptionError
from kdsr.runtime.suggestions import nearest

_FILE = Path(__file__).with_suffix(".yml")


@cache
def _table() -> dict[str, Any]:
    return dict(parse_yaml(_FILE.read_text(encoding="utf-8"), str(_FILE)))


@dataclass(frozen=True)
class Benchmark:
    """The images of a set for one scale.

    Attributes:
        name: Name of the set.
        scale: Upscaling factor.
        rgb: Whether colours are measured, and not the luminance.
        gt: Folder of the ground truth.
        lq: Folder of the LQ images; None: they are made of the ground truth, by Matlab's bicubic interpolation.
    """

    name: str
    scale: int
    rgb: bool
    gt: Path
    lq: Path | None

    @property
    def border(self) -> int:
        """Pixels at each side that are not measured."""
        return self.scale if self.scale > 1 else 0

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """PSNR and SSIM as ``val.metrics``."""
        options = {"crop_border": self.border, "test_y_channel": not self.rgb}
        return {name: {"type": f"calculate_{name}", **options} for name in ("psnr", "ssim")}

    def __str__(self) -> str:
        lq = self.lq or "LQ by Matlab's bicubic"
        return (
            f"{self.name} ×{self.scale}: {'RGB' if self.rgb else 'Y'}, border {self.border}; {self.gt}, {lq}"
        )


def find_benchmark(name: str, root: Path, scale: int, rgb: bool | None = None) -> Benchmark:
    """Finds the folders of a set.

    Args:
        name: A known set, or a folder below ``root``.
        root: Folder of the data sets.
        scale: Upscaling factor.
        rgb: What to measure; None: what papers measure, the luminance for a set that is not known.

    Raises:
        OptionError: No folder has images; the message names those that were looked for.
    """
    kind = _table()["super_resolution" if scale > 1 else "restoration"]
    known = kind["sets"].get(name, {}) if scale == 1 else {}
    listed = known.get("folders") or [[f"{name}/{part}" for part in pair] for pair in kind["folders"]]
    pairs = [[root / part.replace("SCALE", str(scale)) for part in pair] for pair in listed]
    alone = [root / name / part.replace("SCALE", str(scale)) for part in kind.get("gt_only", ())]
    measured = known.get("channel") == "rgb" if rgb is None else rgb
    for gt, lq in [*pairs, *((folder, None) for folder in alone)]:
        if _has_images(gt) and (lq is None or _has_images(lq)):
            return Benchmark(name, scale, measured, gt, lq)
    looked_for = ", ".join(f"{gt} with {lq.name}" for gt, lq in pairs)
    gt_only = f", or the ground truth alone in {', '.join(map(str, alone))}" if alone else ""
    every = {*_table()["super_resolution"]["sets"], *_table()["restoration"]["sets"]}
    if name in every or (root / name).is_dir():
        how = f"get it (kdsr fetch {name}; datasets/README.md), or give its root: --data ROOT"
    else:
        how = nearest(name, every)
    raise OptionError(f"--sets {name}: no images of scale {scale}: looked for {looked_for}{gt_only}; {how}")


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and bool(list_folder(folder).images)


def partners(names: Iterable[str], others: Iterable[str], scale: int) -> dict[str, str | None]:
    """The ground truth of each LQ image, by names below their folders; the endings may differ, and the LQ image's name
    may end in ``xSCALE``."""
    by_stem = {os.path.splitext(name)[0]: name for name in others}
    stems = {name: os.path.splitext(name)[0] for name in names}
    return {
        name: by_stem.get(stem) or by_stem.get(stem.removesuffix(f"x{scale}")) for name, stem in stems.items()
    }


class BenchmarkImages(Dataset):
    """The pairs of a benchmark, as a data set for ``kdsr.models.evaluation.evaluate``.

    An item has ``lq`` and ``gt``, (3, H, W), RGB in [0, 1], ``lq_path`` and ``gt_path``.

    Raises:
        DataError: An image has no ground truth; or, when it is read, a pair's sizes do not fit.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        truths = list_folder(benchmark.gt).images
        names = list_folder(benchmark.lq).images if benchmark.lq else truths
        self.opt = {"name": benchmark.name, "dataroot_lq": str(benchmark.lq or benchmark.gt)}
        pairs = partners(names, truths, benchmark.scale)
        if missing := [name for name, gt in pairs.items() if gt is None]:
            raise DataError(f"{benchmark.gt} has no counterpart of {quote(missing)} in {benchmark.lq}")
        self.pairs = [(name, str(gt)) for name, gt in pairs.items()]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (name, partner), scale = self.pairs[index], self.benchmark.scale
        gt_path = self.benchmark.gt / partner
        gt = read_picture(gt_path).in_8_bits()
        if self.benchmark.lq is None:
            lq_path, gt = gt_path, mod_crop(gt, scale)
            lq = Pixels(imresize(gt, 1 / scale), 255)
        else:
            lq_path = self.benchmark.lq / name
            lq = read_picture(lq_path).pixels
        height, width = lq.values.shape[:2]
        if not sizes_match(gt.shape[:2], (height, width), scale, allow_remainder=True):
            raise DataError(
                f"{lq_path} ({width}x{height}) and {gt_path} ({gt.shape[1]}x{gt.shape[0]}) do not match scale {scale}"
            )
        gt = gt[: height * scale, : width * scale]
        lq_tensor, gt_tensor = as_tensors([lq, Pixels(gt, 255)], {})
        return {"lq": lq_tensor, "gt": gt_tensor, "lq_path": str(lq_path), "gt_path": str(gt_path)}


@dataclass(frozen=True)
class Published:
    """A row of a paper's table: PSNR in dB, or PSNR and SSIM, by set."""

    network: str
    scale: int
    source: str
    values: Mapping[str, Sequence[float]]


def published(sets: Sequence[str], scales: Sequence[int]) -> list[Published]:
    """What papers report of any of these sets at these scales."""
    table, found = _table(), []
    for entry in table["published"]:
        values = {name: entry[name] for name in sets if name in entry}
        if entry["scale"] in scales and values:
            pairs = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
            found.append(
                Published(entry["network"], entry["scale"], table["sources"][entry["source"]], pairs)
            )
    return found
