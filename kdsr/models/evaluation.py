"""Measures a network on a data set, image by image."""

from __future__ import annotations

import csv
import inspect
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.utils import tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from kdsr.data.image_roots import result_name, same_names
from kdsr.metrics.calculation import calculate_metric
from kdsr.runtime.distributed import gather_lists
from kdsr.runtime.errors import DataError, TrainingError, is_out_of_memory
from kdsr.runtime.files import write_whole

CSV_HEADER = ("iteration", "network", "set", "image", "metric", "value")


@dataclass(frozen=True)
class ImageResult:
    """One image's metrics.

    Attributes:
        index: Position in the data set.
        image: Path below the data root without the ending (``result_name``).
        values: By the metric's name in the options.
    """

    index: int
    image: str
    values: dict[str, float]


def extended(lq: Tensor, multiple_of: int) -> Tensor:
    """Extends (N, C, H, W) by reflection at the bottom and the right, to sides divisible by ``multiple_of``.

    Repeatedly where the image is smaller than the extension.
    """
    height, width = (-(-size // multiple_of) * multiple_of for size in lq.shape[-2:])
    image = lq
    while image.shape[-2:] != (height, width):  # reflection extends by at most size - 1 at a time
        h, w = image.shape[-2:]
        down, right = min(height - h, h - 1), min(width - w, w - 1)
        mode = "reflect" if h > 1 and w > 1 else "replicate"
        if mode == "replicate":
            down, right = height - h, width - w
        image = F.pad(image, (0, right, 0, down), mode=mode)
    return image


def pad_and_restore(net: Callable[[Tensor], Tensor], lq: Tensor, multiple_of: int, scale: int) -> Tensor:
    """Runs a network that needs sizes divisible by ``multiple_of`` on an image of any size.

    The image is extended by reflection at the bottom and the right, and the result is cropped.

    Args:
        net: Maps (N, C, H, W) to (N, C, H·scale, W·scale).
        lq: (N, C, H, W).
        multiple_of: What H and W must be divisible by; 1 for any size.
        scale: Upscaling factor of the network.

    Returns:
        (N, C, H·scale, W·scale).
    """
    height, width = lq.shape[-2:]
    return net(extended(lq, multiple_of))[..., : height * scale, : width * scale]


def _rank_share(dataloader: DataLoader, rank: int, world_size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    # BasicSR's validation loaders have batch size 1 and no workers; indexing the data set lets each rank read its
    # own images only, uneven numbers included.
    dataset = dataloader.dataset
    for index in range(rank, len(dataset), world_size):  # type: ignore[arg-type]
        yield index, default_collate([dataset[index]])


def needs_reference(metric: dict[str, Any]) -> bool:
    """Whether a metric of the options compares with GT (PSNR) or looks at the image alone (NIQE)."""
    return "img2" in inspect.signature(dict(iter(METRIC_REGISTRY))[metric["type"]]).parameters


def evaluate(
    restore: Callable[[Tensor], Tensor],
    dataloader: DataLoader,
    metrics: dict[str, dict[str, Any]] | None,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    save_to: Callable[[str], Path] | None = None,
) -> list[ImageResult]:
    """Restores every image of a set and measures it with BasicSR's metrics on 8-bit images.

    Args:
        restore: Maps an LQ batch (1, C, H, W) in [0, 1] to the restored batch.
        dataloader: BasicSR validation or test loader.
        metrics: ``val.metrics`` of the options; where the set has no GT, those that need none.
        device: Where ``restore`` runs.
        rank: This process among ``world_size``; each measures its share and all get all results.
        world_size: Number of processes.
        save_to: Gives the file for an image's name; the restored image is written there as PNG.

    Returns:
        One result per image, in the order of the data set.

    Raises:
        DataError: An image cannot be read, or written, or two have one name; on every rank.
    """
    results: list[ImageResult] = []
    problems: list[str] = []
    opt = getattr(dataloader.dataset, "opt", {})
    root = opt.get("dataroot_lq") or opt.get("dataroot_gt")
    try:
        for index, data in _rank_share(dataloader, rank, world_size):
            name = result_name(data["lq_path"][0], root)
            results.append(_evaluate_one(restore, index, name, data, metrics, device, save_to))
    except (DataError, TrainingError) as error:
        problems = error.problems
    problems = gather_lists(problems)
    if problems:  # on every rank: none must wait for one that is gone
        raise DataError(problems)
    results = sorted(gather_lists(results), key=lambda result: result.index)
    problem = same_names((result.image, f"item {result.index}") for result in results)
    if problem:  # of a data set whose names were not known before
        raise DataError(f"{opt.get('name')}: {problem}")
    return results


def _evaluate_one(
    restore: Callable[[Tensor], Tensor],
    index: int,
    name: str,
    data: dict[str, Any],
    metrics: dict[str, dict[str, Any]] | None,
    device: torch.device,
    save_to: Callable[[str], Path] | None,
) -> ImageResult:
    try:
        with torch.no_grad():
            output = restore(data["lq"].to(device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        height, width = data["lq"].shape[-2:]
        raise TrainingError(
            f"{data['lq_path'][0]}: {width}x{height} pixels need more memory than there is; with val.tile they are "
            "restored in tiles (make these smaller where it is set)"
        ) from error
    image = _as_image(output)
    if save_to is not None:
        png = cv2.imencode(".png", image)[1].tobytes()  # BasicSR's imwrite names no file when it fails
        write_whole(save_to(name), lambda file: file.write(png))
    values = {}
    if metrics and "gt" in data:
        pair = {"img": image, "img2": _as_image(data["gt"])}
        values = {key: float(calculate_metric(pair, opt)) for key, opt in metrics.items()}
    elif metrics:
        values = {
            key: float(calculate_metric({"img": image}, opt))
            for key, opt in metrics.items()
            if not needs_reference(opt)
        }
    return ImageResult(index, name, values)


def _as_image(batch: Tensor) -> np.ndarray:
    """BasicSR's ``tensor2img`` of (1, C, H, W), by rows: at once it takes four times the tensor's memory."""
    return np.concatenate([tensor2img([rows]) for rows in batch.split(256, dim=-2)])


def mean_values(results: list[ImageResult]) -> dict[str, float]:
    """Mean over the images, per metric; empty where nothing was measured."""
    if not results:
        return {}
    return {key: float(np.mean([result.values[key] for result in results])) for key in results[0].values}


@dataclass(frozen=True)
class MeasuredRow:
    """One row of ``metrics.csv``: an image's value of a metric."""

    iteration: int | str
    network: str
    set: str
    image: str
    metric: str
    value: float


def read_csv(path: Path) -> list[MeasuredRow]:
    """The rows of ``metrics.csv``; none where there is no such file.

    Raises:
        DataError: The file is not one of ours.
    """
    if not path.exists():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if number == 1 or not row:
                continue
            try:
                iteration, network, dataset, image, metric, value = row
                at = int(iteration) if iteration.isdecimal() else iteration
                rows.append(MeasuredRow(at, network, dataset, image, metric, float(value)))
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: is no row of {', '.join(CSV_HEADER)}; mend or remove the file"
                ) from error
    return rows


def write_csv(path: Path, rows: list[MeasuredRow]) -> None:
    """Writes ``metrics.csv``, whole or not at all (header: ``CSV_HEADER``)."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for row in rows:
        writer.writerow((row.iteration, row.network, row.set, row.image, row.metric, repr(row.value)))
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def append_csv(
    path: Path, iteration: int | str, network: str, dataset: str, results: list[ImageResult]
) -> None:
    """Adds one row per image and metric to ``metrics.csv``."""
    # The whole file anew: of a validation that was killed while it was written no half may stay.
    added = [
        MeasuredRow(iteration, network, dataset, result.image, metric, value)
        for result in results
        for metric, value in result.values.items()
    ]
    write_csv(path, read_csv(path) + added)


def forget_after(path: Path, iteration: int) -> None:
    """Drops the rows later than ``iteration``: a resumed run measures those again."""
    rows = read_csv(path)
    kept = [row for row in rows if isinstance(row.iteration, int) and row.iteration <= iteration]
    if len(kept) != len(rows):
        write_csv(path, kept)


def recorded_means(path: Path, iteration: int, dataset: str) -> dict[str, float]:
    """The student's mean values on a set at an iteration, from ``metrics.csv``; empty where it was not measured."""
    values: dict[str, list[float]] = {}
    for row in read_csv(path):
        if (row.iteration, row.network, row.set) == (iteration, "student", dataset):
            values.setdefault(row.metric, []).append(row.value)
    return {metric: float(np.mean(of_images)) for metric, of_images in values.items()}
