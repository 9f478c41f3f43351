"""The image pairs on which an exported network is measured: given folders, or the validation sets of its run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdsr.deploy.benchmarks import Benchmark, BenchmarkImages
from kdsr.deploy.network_file import read_options
from kdsr.models.evaluation import EvaluationSettings, evaluate
from kdsr.models.restored_images import Restore
from kdsr.options.tested_run import option_file_of
from kdsr.pipeline.run_data import make_dataset
from kdsr.runtime.errors import DataError, OptionError

_PSNR = "calculate_psnr"
_EXACT = 100.0  # dB


@dataclass(frozen=True)
class Pairs:
    """LQ images with their ground truth.

    Attributes:
        name: What is measured, for the user.
        data: Items with ``lq``, ``gt`` and ``lq_path``, as of BasicSR's ``PairedImageDataset``.
        psnr: The metric, as in ``val.metrics``.
    """

    name: str
    data: Dataset[Any]
    psnr: dict[str, Any]

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def lq(self, count: int) -> Iterator[Tensor]:
        """The first LQ images, (1, C, H, W) in [0, 1]."""
        for index in range(min(count, len(self))):
            yield self.data[index]["lq"][None]


def given_pairs(images: Path, gt: Path | None, scale: int) -> Pairs:
    """LQ images of a folder and their ground truth of another; of one folder and scale > 1 pairs by bicubic reduction.

    Raises:
        OptionError: Scale 1 and no ground truth.
        DataError: A folder has no images, or the pairs do not fit.
    """
    if gt is None and scale == 1:
        raise OptionError(
            "--images: a network of scale 1 is measured on pairs; give the ground truth: --gt FOLDER"
        )
    benchmark = Benchmark(images.name, scale, scale == 1, gt or images, images if gt else None)
    data = BenchmarkImages(benchmark)
    if not len(data):
        raise DataError(f"There is no image in {images}")
    what = "RGB" if benchmark.rgb else "Y"
    made = "" if gt else f", reduced ×{scale} by Matlab's bicubic"
    name = f"{images} ({len(data)} images{made}; {what}, border {benchmark.border})"
    return Pairs(name, data, benchmark.metrics["psnr"])


def validation_pairs(checkpoint: Path) -> list[Pairs]:
    """The validation sets, with ground truth, of the run that a checkpoint lies in; empty where there is no run.

    Raises:
        OptionError: A set cannot be built.
    """
    run = checkpoint.absolute().parent.parent
    try:
        opt = read_options(option_file_of(str(run)))
    except OptionError:
        return []
    metrics = ((opt.get("val") or {}).get("metrics") or {}).values()
    scale = opt.get("scale") or 1
    usual = {"type": _PSNR, "crop_border": scale if scale > 1 else 0, "test_y_channel": scale > 1}
    psnr = next((metric for metric in metrics if metric.get("type") == _PSNR), usual)
    found = []
    for key, options in opt["datasets"].items():
        if key.split("_")[0] == "val" and isinstance(options, Mapping) and options.get("dataroot_gt"):
            dataset = make_dataset(
                key, {**options, "phase": "val", "scale": scale, "name": options.get("name", key)}, 0
            )
            what = "Y" if psnr.get("test_y_channel") else "RGB"
            border = psnr.get("crop_border", 0)
            name = f"{options.get('name', key)} ({len(dataset)} images; {what}, border {border})"
            found.append(Pairs(name, dataset, dict(psnr)))
    return found


def of_one_size(pairs: Pairs, size: tuple[int, int], scale: int) -> Pairs:
    """The middle of those images that have at least ``size`` LQ pixels (H, W).

    Raises:
        DataError: All are smaller.
    """
    items = []
    for index in range(len(pairs)):
        item = pairs.data[index]
        top, left = ((full - side) // 2 for full, side in zip(item["lq"].shape[-2:], size, strict=True))
        if min(top, left) >= 0:
            cut = {
                key: item[key][..., top * by : (top + size[0]) * by, left * by : (left + size[1]) * by]
                for key, by in (("lq", 1), ("gt", scale))
            }
            items.append({**item, **cut})
    if not items:
        raise DataError(
            f"--size: all images of {pairs.name} are smaller than {size[0]}x{size[1]} pixels (H x W)"
        )
    return replace(pairs, name=f"{pairs.name}, {len(items)} cuts of {size[0]}x{size[1]}", data=_Items(items))


class _Items(Dataset[Any]):
    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def mean_psnr(restore: Restore, pairs: Pairs, scale: int, network: str) -> float:
    """Mean PSNR in dB of what ``restore`` makes of the LQ images; an image that is restored exactly counts 100 dB.

    Raises:
        DataError, TrainingError: See ``evaluate``.
    """
    settings = EvaluationSettings({"psnr": pairs.psnr}, None, scale, network)
    loader: Any = DataLoader(pairs.data)
    results = evaluate(restore, loader, settings, torch.device("cpu"))
    return float(np.mean([min(result.values["psnr"], _EXACT) for result in results]))
