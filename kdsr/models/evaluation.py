"""Measures a network on a data set, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from kdsr.data.image_roots import result_name, same_names
from kdsr.models.image_metrics import (
    as_image,
    baseline_image,
    is_finite,
    metric_values,
    shape_problem,
    without_normalisation,
)
from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.distributed import gather_lists
from kdsr.runtime.errors import DataError, KdsrError, TrainingError, is_out_of_memory


@dataclass(frozen=True)
class ImageResult:
    """One image's metrics.

    Attributes:
        index: Position in the data set.
        image: Path below the data root without the ending (``result_name``).
        values: Values by the metric's name in the options.
        baseline: Values of the image without a network, if requested.
        unmeasured: Reasons for missing values of the baseline.
    """

    index: int
    image: str
    values: dict[str, float]
    baseline: dict[str, float] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSettings:
    """Metrics of an evaluation, and names for messages.

    Args:
        metrics: ``val.metrics`` of the options.
        baseline: The metrics that are also computed for the baseline.
        scale: Upscaling factor.
        network: Name of the network in messages, such as ``the student``.
        colour: Name in messages of the option that sets the channels of the images.
    """

    metrics: dict[str, dict[str, Any]] | None = None
    baseline: dict[str, dict[str, Any]] | None = None
    scale: int = 1
    network: str = "the network"
    colour: str = "color of the data set"


def _rank_share(dataloader: DataLoader, rank: int, world_size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    # BasicSR's validation loaders have batch size 1 and no workers. Indexing the data set lets each rank read only its
    # own images, even if their number is not divisible.
    dataset = dataloader.dataset
    for index in range(rank, len(dataset), world_size):  # type: ignore[arg-type]
        yield index, default_collate([dataset[index]])


def evaluate(
    restore: Callable[[Tensor], Tensor],
    dataloader: DataLoader,
    settings: EvaluationSettings | dict[str, dict[str, Any]] | None,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    save_to: Callable[[str], Path] | None = None,
) -> list[ImageResult]:
    """Restores every image of a set and computes BasicSR's metrics on 8-bit images.

    Args:
        restore: Maps an LQ batch of the set, (1, C, H, W), to the restored batch.
        dataloader: BasicSR validation or test loader. Its set's ``mean`` and ``std`` are undone before measuring.
        settings: The settings, or only the metrics. Metrics that need GT are skipped if the set has none.
        device: Where ``restore`` runs.
        rank: Rank of this process; each rank measures its share, and all get all results.
        world_size: Number of processes.
        save_to: Returns the file for an image's name; the restored image is written there as PNG.

    Returns:
        One result per image, in the order of the data set; every value is finite.

    Raises:
        DataError: An image cannot be read, written or measured, or two images have the same name; on every rank.
        TrainingError: The output for an image is not finite; on every rank.
    """
    if not isinstance(settings, EvaluationSettings):
        settings = EvaluationSettings(metrics=settings)
    results: list[ImageResult] = []
    problems: list[tuple[type[KdsrError], str]] = []
    opt = getattr(dataloader.dataset, "opt", {})
    root = opt.get("dataroot_lq") or opt.get("dataroot_gt")
    normalised = tuple(getattr(dataloader.dataset, key, None) for key in ("mean", "std"))
    try:
        for index, data in _rank_share(dataloader, rank, world_size):
            name = result_name(data["lq_path"][0], root)
            results.append(_evaluate_one(restore, index, name, data, settings, device, save_to, normalised))
    except (DataError, TrainingError) as error:
        problems = [(type(error), problem) for problem in error.problems]
    problems = gather_lists(problems)
    if problems:  # on every rank, to avoid a deadlock
        raise problems[0][0]([problem for _, problem in problems])
    results = sorted(gather_lists(results), key=lambda result: result.index)
    problem = same_names((result.image, f"item {result.index}") for result in results)
    if problem:  # a data set whose names were not known before
        raise DataError(f"{opt.get('name')}: {problem}")
    return results


def _evaluate_one(
    restore: Callable[[Tensor], Tensor],
    index: int,
    name: str,
    data: dict[str, Any],
    settings: EvaluationSettings,
    device: torch.device,
    save_to: Callable[[str], Path] | None,
    normalised: tuple[Any, ...],
) -> ImageResult:
    path = data["lq_path"][0]
    output = restore_item(restore, data, settings, device)
    image, gt = images_to_compare(output, data, normalised)
    if save_to is not None:
        png = cv2.imencode(".png", image)[1].tobytes()  # the errors of BasicSR's imwrite lack the file's name
        atomic_write(save_to(name), lambda file: file.write(png))
    if settings.metrics and gt is not None and (problem := shape_problem(image, gt, settings.colour)):
        raise DataError(f"{path}: the output of {settings.network} {problem}")
    result, failed = measure_image(image, gt, data, index, name, settings, normalised)
    if failed:
        metrics = settings.metrics or {}
        raise DataError(
            [
                f"{path}, restored by {settings.network}: {metrics[key]['type']} (val.metrics.{key}) cannot measure "
                f"{image.shape[0]}×{image.shape[1]} pixels: {why}"
                for key, why in failed.items()
            ]
        )
    return result


def restore_item(
    restore: Callable[[Tensor], Tensor],
    data: dict[str, Any],
    settings: EvaluationSettings,
    device: torch.device,
) -> Tensor:
    """Restores an item of a set; returns the output, (1, C, H, W).

    Other errors of the network get a note with the image's name.

    Raises:
        TrainingError: The output is not finite.
        DataError: The image does not fit into memory.
    """
    path = data["lq_path"][0]
    height, width = data["lq"].shape[-2:]
    try:
        with torch.no_grad():
            output = restore(data["lq"].to(device))
        finite = is_finite(output)
    except Exception as error:
        if not is_out_of_memory(error):
            error.add_note(f"while {settings.network} restored {path} ({height}×{width} pixels)")
            raise
        raise DataError(
            f"{path}: {width}x{height} pixels do not fit into memory; set val.tile to restore in tiles, "
            "or make the tiles smaller"
        ) from error
    if not finite:
        raise TrainingError(
            f"{path}: the output of {settings.network} is not finite (NaN or infinite); its weights are not "
            "finite or too large: use another checkpoint, or a lower train.optim_g.lr in training"
        )
    return output


def images_to_compare(
    output: Tensor, data: dict[str, Any], normalised: tuple[Any, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns a network's output and the ground truth as 8-bit images, without the set's normalisation."""
    gt = as_image(without_normalisation(data["gt"], *normalised)) if "gt" in data else None
    return as_image(without_normalisation(output, *normalised)), gt


def measure_image(
    image: np.ndarray,
    gt: np.ndarray | None,
    data: dict[str, Any],
    index: int,
    name: str,
    settings: EvaluationSettings,
    normalised: tuple[Any, ...],
) -> tuple[ImageResult, dict[str, str]]:
    """Computes the metrics of a restored image and its baseline; also returns reasons for failed metrics."""
    values, failed = metric_values(image, gt, settings.metrics)
    result = ImageResult(index, name, values)
    if settings.baseline:
        baseline = baseline_image(as_image(without_normalisation(data["lq"], *normalised)), settings.scale)
        found, without = metric_values(baseline, gt, settings.baseline)
        result = replace(result, baseline=found, unmeasured=without)
    return result, failed


def mean_values(results: list[ImageResult]) -> dict[str, float]:
    """Mean over the images, per metric; empty if there are no results."""
    if not results:
        return {}
    return {key: float(np.mean([result.values[key] for result in results])) for key in results[0].values}


def mean_baseline(results: list[ImageResult]) -> dict[str, float]:
    """Mean of the baseline, per metric, over the images that have a value."""
    values: dict[str, list[float]] = {}
    for result in results:
        for key, value in result.baseline.items():
            values.setdefault(key, []).append(value)
    return {key: float(np.mean(of_images)) for key, of_images in values.items()}
