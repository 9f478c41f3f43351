"""MeasuredModel: how a model is validated and tested."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.models.evaluation import append_csv, evaluate, mean_values, pad_and_restore


class MeasuredModel(SRModel):
    """BasicSR's SRModel with another validation: of any image size, shared among ranks, keeping each image's values."""

    net_g: nn.Module

    def init_measures(self) -> None:
        self.best_metric_results: dict[str, dict[str, Any]] = {}
        self.metric_results: dict[str, float] = {}
        self._validated: set[tuple[str, Any]] = set()
        self.iteration = 0  # the last one trained

    def size_multiple(self, net: nn.Module) -> int:
        """What an image's height and width must be divisible by for ``net``: what it declares, and ``val`` says."""
        val = self.opt.get("val") or {}
        declared: Any = getattr(net, "window_size", None) or getattr(net, "multiple_of", 1)
        return math.lcm(int(declared), int(val.get("multiple_of") or val.get("window_size") or 1))

    def restore(self, lq: Tensor) -> Tensor:
        """Restores images of any size with the network under test (the EMA where there is one)."""
        return self.restore_with(getattr(self, "net_g_ema", self.net_g), lq)

    def restore_with(self, net: nn.Module, lq: Tensor) -> Tensor:
        training = net.training
        net.eval()
        try:
            return pad_and_restore(net, lq, self.size_multiple(net), self.opt.get("scale") or 1)
        finally:
            net.train(training)

    def test(self) -> None:
        with torch.no_grad():
            self.output = self.restore(self.lq)

    def validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool = False) -> None:
        """Validates on all ranks, logs the means, appends each image's values to ``metrics.csv``."""
        if self.is_train:
            current_iter = self.iteration  # BasicSR's last validation comes with one past the end
        dataset_name = dataloader.dataset.opt["name"]
        if (dataset_name, current_iter) in self._validated:
            return  # BasicSR validates once more at the end of training
        self._validated.add((dataset_name, current_iter))
        values = self.measure(self.restore, dataloader, current_iter, "student", save_img)
        if not values:
            return
        self.metric_results = values
        if self.best_metric_results.get(dataset_name, {}).keys() != values.keys():
            self.best_metric_results.pop(dataset_name, None)  # other metrics than those of the run it resumed
        self._initialize_best_metric_results(dataset_name)
        if self.is_train:
            for metric, value in values.items():
                self._update_best_metric_result(dataset_name, metric, value, current_iter)
            self._log_validation_metric_values(current_iter, dataset_name, tb_logger)
        else:
            lines = "".join(f"\t # {metric}: {value:.4f}\n" for metric, value in values.items())
            get_root_logger().info(f"Validation {dataset_name}\n{lines}")

    def measure(
        self,
        restore: Callable[[Tensor], Tensor],
        dataloader: Any,
        iteration: int | str,
        network: str,
        save_img: bool = False,
    ) -> dict[str, float]:
        """Means of the metrics over a set; the values of each image go to ``metrics.csv``."""
        dataset_name = dataloader.dataset.opt["name"]
        results = evaluate(
            restore,
            dataloader,
            self.opt["val"].get("metrics"),
            self.device,
            rank=self.opt["rank"],
            world_size=self.opt["world_size"],
            save_to=(lambda image: self.image_path(dataset_name, image, iteration)) if save_img else None,
        )
        if self.opt["rank"] == 0:
            append_csv(self.metrics_file, iteration, network, dataset_name, results)
        return mean_values(results)

    @property
    def metrics_file(self) -> Path:
        """Where the values of each image go: ``metrics.csv`` in the run's folder."""
        return Path(self.opt["path"]["experiments_root" if self.is_train else "results_root"]) / "metrics.csv"

    def image_path(self, dataset_name: str, image: str, iteration: int | str) -> Path:
        """BasicSR's places for saved images."""
        folder = Path(self.opt["path"]["visualization"])
        if self.is_train:
            return folder / image / f"{image}_{iteration}.png"
        suffix = self.opt["val"].get("suffix") or self.opt["name"]
        return folder / dataset_name / f"{image}_{suffix}.png"
