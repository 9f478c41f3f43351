"""Measures a network on a data set.

The main thread runs the network. If there are cores to spare, one thread meanwhile loads the next images, and others
measure and save the last ones. Order and values of the results do not depend on their timing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    metric_values,
    needs_no_main_thread,
    shape_problem,
    without_normalisation,
    without_numpy_warnings,
)
from kdsr.models.restored_images import Loaded, Restore, Restored, ahead, batches, free_threads, restored
from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.distributed import gather_lists
from kdsr.runtime.errors import DataError, KdsrError, TrainingError


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
        batch_size: Images of one size that the network gets at once, at most; None: see ``largest_batch``.
    """

    metrics: dict[str, dict[str, Any]] | None = None
    baseline: dict[str, dict[str, Any]] | None = None
    scale: int = 1
    network: str = "the network"
    colour: str = "color of the data set"
    batch_size: int | None = None


def evaluate(
    restore: Restore,
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
    dataset: Any = dataloader.dataset
    opt = getattr(dataset, "opt", {})
    root = opt.get("dataroot_lq") or opt.get("dataroot_gt")
    normalised = tuple(getattr(dataset, key, None) for key in ("mean", "std"))

    def load(index: int) -> Loaded:
        data = as_batch(dataset[index])
        return Loaded(index, result_name(data["lq_path"][0], root), data)

    def measure(image: Restored) -> ImageResult:
        try:
            return _measured(image, settings, save_to, normalised)
        except Exception as error:
            if not isinstance(error, KdsrError):
                error.add_note(f"while the output of {settings.network} for {image.of.path} was measured")
            raise

    results: list[ImageResult] = []
    problems: list[tuple[type[KdsrError], str]] = []
    threads = free_threads(device)
    in_main = not needs_no_main_thread((settings.metrics or {}) | (settings.baseline or {}))
    try:
        with (
            without_numpy_warnings(),
            ThreadPoolExecutor(1) as loading,
            ThreadPoolExecutor(threads or 1) as measuring,
        ):
            # BasicSR's validation loaders have batch size 1 and no workers. Indexing the data set lets each rank read
            # only its own images, even if their number is not divisible.
            loaded = ahead(loading if threads else None, load, range(rank, len(dataset), world_size))
            outputs = (
                image
                for group in batches(loaded, device, settings.batch_size)
                for image in restored(restore, group, settings.network, device, normalised)
            )
            results = [*ahead(None if in_main or not threads else measuring, measure, outputs)]
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


def _measured(
    restored: Restored,
    settings: EvaluationSettings,
    save_to: Callable[[str], Path] | None,
    normalised: tuple[Any, ...],
) -> ImageResult:
    of, gt, path = restored.of, restored.gt, restored.of.path
    require_finite(restored.finite, path, settings.network)
    image = as_image(restored.output)
    if save_to is not None:
        png = cv2.imencode(".png", image)[1].tobytes()  # the errors of BasicSR's imwrite lack the file's name
        atomic_write(save_to(of.name), lambda file: file.write(png))
    if settings.metrics and gt is not None and (problem := shape_problem(image, gt, settings.colour)):
        raise DataError(f"{path}: the output of {settings.network} {problem}")
    result, failed = measure_image(image, gt, of.data, of.index, of.name, settings, normalised)
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


def as_batch(item: dict[str, Any]) -> dict[str, Any]:
    """``default_collate([item])`` without copies of the images."""
    images = {key: value[None] for key, value in item.items() if isinstance(value, Tensor)}
    return default_collate([{key: value for key, value in item.items() if key not in images}]) | images


def require_finite(finite: Tensor, path: str, network: str) -> None:
    """Raises a TrainingError if ``finite``, a boolean scalar, is false; waits for the device."""
    if not finite:
        raise TrainingError(
            f"{path}: the output of {network} is not finite (NaN or infinite); its weights are not "
            "finite or too large: use another checkpoint, or a lower train.optim_g.lr in training"
        )


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
