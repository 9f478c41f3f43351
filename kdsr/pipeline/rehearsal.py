"""Tries validation before anything is written: restores and measures images of every set."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from kdsr.models.evaluation import (
    EvaluationSettings,
    ImageResult,
    images_to_compare,
    measure_image,
    require_finite,
)
from kdsr.models.image_metrics import (
    baseline_image,
    is_finite,
    metric_values,
    shape_problem,
    without_numpy_warnings,
)
from kdsr.models.kd_model import KDModel
from kdsr.models.restored_images import Restore, largest_batch, restore_batch
from kdsr.models.restorer import pad_in_tests
from kdsr.models.sections import ValOptions
from kdsr.models.teacher_check import teacher_warnings
from kdsr.models.trainer import LoopInterface
from kdsr.options.stock import STOCK_MODELS
from kdsr.pipeline.preflight import describe_error, first_items, generators_kept
from kdsr.runtime.errors import KdsrError, OptionError

LARGEST = 128 * 128  # LQ pixels of an image that a network gets: about a training patch


class ValidationRehearsal:
    """Restores and measures the first and the smallest image of every validation or test set.

    Images with more than ``LARGEST`` LQ pixels are cropped to the upper left corner. A failing metric is reported only
    if it also fails on the whole image without a network, because the output of an untrained student may be the cause.

    Args:
        opt: The parsed options.
        datasets: The data sets of the run by their keys.
    """

    def __init__(self, opt: dict[str, Any], datasets: dict[str, Any]) -> None:
        self.opt = opt
        sets = datasets.items() if opt.get("val") else ()
        self.datasets = {key: dataset for key, dataset in sets if key != "train" and len(dataset)}
        self.problems: list[str] = []
        self.results: dict[str, list[ImageResult]] = {}  # the teacher's, by set

    def try_model(self, model: Any) -> None:
        """Collects the problems of a model with its initial weights.

        For models that are neither kdsr's nor BasicSR's image models, only the metrics are tried, without a network.
        """
        if type(model).__name__ in STOCK_MODELS:
            pad_in_tests(model, self.opt)
        networks = _networks(model)
        with generators_kept(self.opt), without_numpy_warnings():
            for key, dataset in self.datasets.items():
                self._try_set(key, dataset, networks, model)

    def _try_set(
        self, key: str, dataset: Any, networks: dict[str, tuple[Restore, nn.Module]], model: Any
    ) -> None:
        device = getattr(model, "device", torch.device("cpu"))
        smallest = dataset.smallest()
        reported: set[tuple[str, str]] = (
            set()
        )  # problems of the first image are not repeated for the smallest
        for index in dict.fromkeys((0, smallest)):
            options = self.opt["datasets"][key]
            item = first_items(key, options, lambda index=index: dataset[index])  # type: ignore[misc]
            if not isinstance(item, dict) or not isinstance(item.get("lq"), Tensor) or item["lq"].ndim != 3:
                return  # an unknown type of data set
            if networks and not isinstance(item.get("lq_path"), str):
                self.problems.append(
                    f"datasets.{key}: {options['type']} gives items without lq_path; it must be the name of the image, "
                    "which names the results"
                )
                return
            for place in networks or ("",):
                if place.startswith("network_t") and self._teacher_is_measured() and index != smallest:
                    continue
                image = _Image(self.opt, key, dataset, default_collate([item]), index)
                if networks:
                    found = image.try_network(place, *networks[place], device)
                    if not found and isinstance(model, LoopInterface):
                        found = image.try_batch(place, networks[place][0], device)
                else:
                    found = image.try_metrics(image.metrics)
                self.problems += [text for topic, text in found.items() if (place, topic) not in reported]
                reported |= {(place, topic) for topic in found}
                if image.result is not None and image.result.baseline:
                    self.results.setdefault(dataset.opt["name"], []).append(image.result)

    def _teacher_is_measured(self) -> bool:
        """Whether the run validates the teacher on all images before it trains."""
        return bool((self.opt.get("val") or {}).get("teacher"))

    def conclude(self) -> list[str]:
        """Returns warnings about sets on which the teacher is worse than the baseline; none if the run validates it.

        Raises:
            OptionError: All problems of all sets, each with the image's name.
        """
        if self.problems:
            raise OptionError(list(dict.fromkeys(self.problems)))
        return [] if self._teacher_is_measured() else teacher_warnings(self.results, self.opt)


def _networks(model: Any) -> dict[str, tuple[Restore, nn.Module]]:
    """Returns the networks that validation uses, by their keys in the options."""
    if isinstance(model, LoopInterface):
        found: dict[str, tuple[Restore, nn.Module]] = {"network_g": (model.restore, model.net_g)}
        if isinstance(model, KDModel):
            teachers = model.teachers_by_place().items()
            found |= {place: (partial(model.restore_with, net), net) for place, net in teachers}
        return found
    if type(model).__name__ in STOCK_MODELS:
        return {"network_g": (lambda lq: _restore_as_basicsr(model, lq), model.net_g)}
    return {}


def _restore_as_basicsr(model: Any, lq: Tensor) -> Tensor:
    model.feed_data({"lq": lq})
    model.test()
    return model.output


class _Image:
    """An image of a set. Its methods return problems by topic: ``network``, or the name of a metric."""

    def __init__(self, opt: dict[str, Any], key: str, dataset: Any, data: dict[str, Any], index: int) -> None:
        self.opt, self.key, self.data, self.index = opt, key, data, index
        self.set = dataset.opt["name"]
        self.normalised = tuple(getattr(dataset, name, None) for name in ("mean", "std"))
        self.metrics = opt["val"].get("metrics") or {}
        self.scale = opt.get("scale") or 1
        self.path = data.get("lq_path", [f"item {index}"])[0]
        self.result: ImageResult | None = None

    def try_network(
        self, place: str, restore: Restore, net: nn.Module, device: torch.device
    ) -> dict[str, str]:
        kind = self.opt[place]["type"] if isinstance(self.opt.get(place), dict) else type(net).__name__
        network = f"{place} ({kind})"
        baseline = self.metrics if place == "network_t" else None
        settings = EvaluationSettings(
            self.metrics, baseline, self.scale, network, f"datasets.{self.key}.color"
        )
        patch = self.patch()
        try:
            output = restore_batch(restore, [patch], network, device)
            require_finite(is_finite(output), self.path, network)
            image, gt = images_to_compare(output, patch, self.normalised)
            if gt is not None and (problem := shape_problem(image, gt, settings.colour)):
                return {"network": f"datasets.{self.key}: {self.path}: the output of {network} {problem}"}
            self.result, failed = measure_image(
                image, gt, patch, self.index, self.path, settings, self.normalised
            )
        except KdsrError as error:
            return {"network": f"datasets.{self.key}: {'; '.join(error.problems)}"}
        except Exception as error:  # any error of a network
            hint = _channel_hint(net, patch["lq"], settings.colour)
            height, width = patch["lq"].shape[-2:]
            return {
                "network": f"datasets.{self.key}: {network} fails on {self.path} ({height}×{width} pixels): "
                f"{hint or describe_error(error)}"
            }
        return self.try_metrics(failed)

    def try_batch(self, place: str, restore: Restore, device: torch.device) -> dict[str, str]:
        """Compares the output with that beside another image, if validation makes batches of this size."""
        height, width = self.data["lq"].shape[-2:]
        asked = ValOptions.read(self.opt["val"]).batch_size
        if largest_batch(height, width, device, asked) == 1:
            return {}
        lq = self.patch()["lq"].to(device)
        try:
            with torch.no_grad():
                alone, beside = restore(lq), restore(torch.cat([lq, 1 - lq]))[:1]
            if (
                alone - beside
            ).abs().mean() <= 0.01 * alone.abs().mean():  # rounding, of tensor cores as well
                return {}
            what = f"the output of {place} for an image depends on the other images of its batch"
        except Exception as error:  # any error of a network
            what = f"{place} fails on two images at once: {describe_error(error)}"
        return {"batch": f"val.batch_size: {what}; set it to 1"}

    def patch(self) -> dict[str, Any]:
        """Returns the image, cropped to at most ``LARGEST`` LQ pixels."""
        height, width = self.data["lq"].shape[-2:]
        if height * width <= LARGEST:
            return self.data
        short = min(height, width, int(LARGEST**0.5))
        long = LARGEST // short
        rows, columns = (short, long) if height <= width else (long, short)
        cut = {**self.data, "lq": self.data["lq"][..., :rows, :columns]}
        if "gt" in cut:
            cut["gt"] = cut["gt"][..., : rows * self.scale, : columns * self.scale]
        return cut

    def try_metrics(self, names: Iterable[str]) -> dict[str, str]:
        """Returns a message for each metric that fails on the whole image without a network."""
        metrics = {name: self.metrics[name] for name in names}
        if not metrics:
            return {}
        lq, gt = images_to_compare(self.data["lq"], self.data, self.normalised)
        # one grey level from the ground truth, so that the PSNR is finite
        image = baseline_image(lq, self.scale) if gt is None else gt ^ np.uint8(1)
        height, width = image.shape[:2]
        return {
            name: f"val.metrics.{name}: {metrics[name]['type']} cannot measure {self.path} of {self.set} "
            f"({height}×{width} pixels): {why}"
            for name, why in metric_values(image, gt, metrics)[1].items()
        }


def _channel_hint(net: nn.Module, lq: Tensor, colour: str) -> str | None:
    """Returns a hint if the network takes another number of channels than the images have."""
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    taken, given = (first.in_channels if first is not None else 0), lq.shape[1]
    if {taken, given} != {1, 3}:
        return None
    remedy = f"set {colour}: y" if taken == 1 else f"remove {colour}"
    return f"it takes {taken} channel{'s' * (taken > 1)}, the image has {given}; {remedy}"
