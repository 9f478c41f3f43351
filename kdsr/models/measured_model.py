"""MeasuredModel: how a model is validated and tested."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from basicsr.models.sr_model import SRModel
from basicsr.models.swinir_model import SwinIRModel
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.distill.padding import extended, pad_and_restore
from kdsr.models.evaluation import (
    ImageResult,
    Wanted,
    evaluate,
    mean_baseline,
    mean_values,
)
from kdsr.models.image_metrics import baseline_name
from kdsr.models.metrics_file import BASELINE, append_csv, recorded_means
from kdsr.models.self_ensemble import self_ensemble
from kdsr.models.tiling import tile_of, tiled
from kdsr.runtime.distributed import on_first_rank
from kdsr.runtime.errors import DataError


class MeasuredModel(SRModel):
    """BasicSR's SRModel with another validation: of any image size, shared among ranks, keeping each image's values."""

    net_g: nn.Module
    HAS_BASELINE = True  # False: the input of a validation is what its output is compared with

    def init_measures(self) -> None:
        self.best_metric_results: dict[str, dict[str, Any]] = {}
        self.metric_results: dict[str, float] = {}
        self._validated: set[tuple[str, Any]] = set()
        self._baselines: dict[str, dict[str, float]] = {}  # mean values by set
        self._declared_multiples: dict[nn.Module, int] = {}  # asked at each step, found out once
        self.iteration = 0  # the last one trained
        # set by the pipeline's loop
        self.before_validation: Callable[[], None] | None = None
        self.validation_failed: Callable[[], None] | None = None

    def size_multiple(self, net: nn.Module) -> int:
        """What an image's height and width must be divisible by for ``net``: what it declares, and ``val`` says."""
        val = self.opt.get("val") or {}
        if net not in self._declared_multiples:
            self._declared_multiples[net] = _declared_multiple(net)
        return math.lcm(
            self._declared_multiples[net], int(val.get("multiple_of") or val.get("window_size") or 1)
        )

    def restore(self, lq: Tensor) -> Tensor:
        """Restores images of any size with the network under test (the EMA where there is one)."""
        return self.restore_with(getattr(self, "net_g_ema", self.net_g), lq)

    def restore_with(self, net: nn.Module, lq: Tensor) -> Tensor:
        """Restores images of any size with a network, as ``val`` says: whole or in tiles, of one view or of eight."""
        val = self.opt.get("val") or {}
        tile = tile_of(val)
        multiple_of, scale = self.size_multiple(net), self.opt.get("scale") or 1
        # The views of a tile, not the tiles of a view: the mean then takes a tile's memory, not another image's.
        restore = self_ensemble(net) if val.get("self_ensemble") else net
        training = net.training
        net.eval()
        try:
            if tile is not None:
                return tiled(restore, lq, *tile, scale, multiple_of)
            return pad_and_restore(restore, lq, multiple_of, scale)
        finally:
            net.train(training)

    def test(self) -> None:
        with torch.no_grad():
            self.output = self.restore(self.lq)

    def validation(self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool = False) -> None:
        """Validates on all ranks, logs the means, adds each image's values to ``metrics.csv`` and to TensorBoard."""
        if self.is_train:
            current_iter = self.iteration  # BasicSR's last validation comes with one past the end
        dataset_name = dataloader.dataset.opt["name"]
        if (dataset_name, current_iter) in self._validated:
            return  # BasicSR validates once more at the end of training
        self._validated.add((dataset_name, current_iter))
        if self.before_validation is not None:
            self.before_validation()
        try:
            results = self.measure_images(
                self.restore, dataloader, current_iter, save_img, self.tested_network()
            )
        except (
            DataError
        ):  # on all ranks; the network is sound: what it has learnt since its last state is saved
            if self.validation_failed is not None:
                self.validation_failed()
            raise
        self.metric_results = mean_values(results)
        if self.metric_results and self.is_train:
            # The best checkpoint first: a validation that is in metrics.csv is not made again.
            self.note_best(dataset_name, self.metric_results, current_iter)
        self.record(current_iter, "student", dataset_name, results)
        if self.metric_results and self.is_train:
            self.log_means(f"Validation {dataset_name}", self.metric_results, dataset_name, with_best=True)
            if tb_logger:
                for metric, value in self.metric_results.items():
                    tb_logger.add_scalar(f"metrics/{dataset_name}/{metric}", value, current_iter)
                for metric, value in self._baselines.get(dataset_name, {}).items():
                    tb_logger.add_scalar(f"baseline/{dataset_name}/{metric}", value, current_iter)
                for result in results:
                    for metric, value in result.values.items():
                        tag = f"images/{dataset_name}/{metric}/{result.image}"
                        tb_logger.add_scalar(tag, value, current_iter)
        elif self.metric_results:
            self.log_means(f"Validation {dataset_name}", self.metric_results, dataset_name)

    def validate_due(self, dataloaders: list[Any], tb_logger: Any) -> None:
        """Makes, at a resume, the validations of the state's iteration that the killed run still owed.

        Those that ``metrics.csv`` has are not repeated; they may set a best value that the state does not know yet,
        for it was saved before them.
        """
        val = self.opt["val"]
        names = [dataloader.dataset.opt["name"] for dataloader in dataloaders]

        def recorded() -> list[dict[str, float]]:
            return [recorded_means(self.metrics_file, self.iteration, name) for name in names]

        # What rank 0 reads counts: the others may not see its disk.
        for dataloader, name, means in zip(dataloaders, names, on_first_rank(recorded), strict=True):
            if means:
                self.note_best(name, means, self.iteration)
                self._validated.add((name, self.iteration))
            elif self.iteration % val["val_freq"] == 0:
                self.validation(dataloader, self.iteration, tb_logger, val["save_img"])

    def note_best(self, dataset_name: str, values: dict[str, float], current_iter: int) -> None:
        """Takes the mean values of a set into ``best_metric_results``.

        Where a resumed run has other metrics than the run before, the best values of those that are still there go on.
        """
        before = self.best_metric_results.pop(dataset_name, {})
        if not self.opt["val"].get("metrics"):
            return
        self._initialize_best_metric_results(dataset_name)
        best = self.best_metric_results[dataset_name]
        for metric in best:
            if metric in before and before[metric]["better"] == best[metric]["better"]:
                best[metric] = before[metric]
            if metric in values:
                self._update_best_metric_result(dataset_name, metric, values[metric], current_iter)

    def tested_network(self) -> str:
        """The network that ``restore`` uses, for messages."""
        if not self.is_train:
            return "the tested network"
        return "the student's EMA" if hasattr(self, "net_g_ema") else "the student"

    def measure_images(
        self,
        restore: Callable[[Tensor], Tensor],
        dataloader: Any,
        iteration: int | str,
        save_img: bool = False,
        network: str = "the network",
    ) -> list[ImageResult]:
        """Measures every image of a set, all ranks together; the baseline only where its values are not known yet."""
        dataset_name = dataloader.dataset.opt["name"]
        metrics = self.opt["val"].get("metrics") or {}
        if dataset_name not in self._baselines:
            self._baselines[dataset_name] = on_first_rank(
                lambda: recorded_means(self.metrics_file, 0, dataset_name, BASELINE)
            )
        known = self._baselines[dataset_name]
        unknown = {key: metric for key, metric in metrics.items() if self.HAS_BASELINE and key not in known}
        results = evaluate(
            restore,
            dataloader,
            Wanted(metrics, unknown, self.opt.get("scale") or 1, network),
            self.device,
            rank=self.opt["rank"],
            world_size=self.opt["world_size"],
            save_to=(lambda image: self.image_path(dataset_name, image, iteration)) if save_img else None,
        )
        known |= mean_baseline(results)
        self._warn_of_unmeasured(dataset_name, results)
        return results

    def _warn_of_unmeasured(self, dataset_name: str, results: list[ImageResult]) -> None:
        failed = [
            f"{result.image} ({metric}: {why})"
            for result in results
            for metric, why in result.unmeasured.items()
        ]
        if failed:
            more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
            get_root_logger().warning(
                f"{dataset_name}: no {baseline_name(self.opt.get('scale') or 1)} baseline of "
                f"{', '.join(failed[:3])}{more}; the baseline's mean is that of the other images. "
                "An input that equals its ground truth may be in the wrong folder"
            )

    def record(
        self, iteration: int | str, network: str, dataset_name: str, results: list[ImageResult]
    ) -> None:
        """Adds the values of each image to ``metrics.csv``, in training those of a new baseline too."""
        if not self.is_train:  # programs that read a test's file expect the tested network alone
            results = [replace(result, baseline={}) for result in results]
        on_first_rank(lambda: append_csv(self.metrics_file, iteration, network, dataset_name, results))

    def log_means(
        self, title: str, values: dict[str, float], dataset_name: str, with_best: bool = False
    ) -> None:
        """Logs mean values of a set, each beside the baseline's and, for the student, the best one so far."""
        baseline, name = self._baselines.get(dataset_name, {}), baseline_name(self.opt.get("scale") or 1)
        lines = [title]
        for metric, value in values.items():
            line = f"\t # {metric}: {value:.4f}"
            if metric in baseline:
                line += f" ({name} {baseline[metric]:.4f})"
            if with_best:
                best = self.best_metric_results[dataset_name][metric]
                line += f"\tBest: {best['val']:.4f} @ {best['iter']} iter"
            lines.append(line)
        get_root_logger().info("\n".join(lines) + "\n")

    @property
    def metrics_file(self) -> Path:
        """Where the values of each image go: ``metrics.csv`` in the run's folder."""
        return Path(self.opt["path"]["experiments_root" if self.is_train else "results_root"]) / "metrics.csv"

    def image_path(self, dataset_name: str, image: str, iteration: int | str) -> Path:
        """BasicSR's places for saved images; in training below the set's name, which BasicSR leaves out."""
        folder = Path(self.opt["path"]["visualization"], dataset_name)
        if self.is_train:
            return folder / image / f"{Path(image).name}_{iteration}.png"
        suffix = self.opt["val"].get("suffix") or self.opt["name"]
        return folder / f"{image}_{suffix}.png"


def pad_in_tests(model: Any, opt: dict[str, Any]) -> None:
    """Gives a model of BasicSR's images whose sides suit its network, and crops what comes out.

    Of BasicSR's models SwinIRModel alone pads, and by less than its images have pixels only; the others end in a
    traceback on an image that is no multiple of a window. A model with a ``test`` of its own is left as it is.

    Args:
        model: An SRModel or a child of it.
        opt: The options; ``val.window_size`` counts, as in our models.
    """
    if getattr(type(model), "test", None) not in (SRModel.test, SwinIRModel.test):
        return
    stock = model.test
    asked = int((opt.get("val") or {}).get("window_size") or 1)
    multiple = math.lcm(asked, _declared_multiple(model.get_bare_model(model.net_g)))

    def test() -> None:
        whole = model.lq
        model.lq = extended(whole, multiple)
        stock()
        model.lq = whole
        height, width = (side * (opt.get("scale") or 1) for side in whole.shape[-2:])
        model.output = model.output[..., :height, :width]

    if multiple > 1:
        model.test = test


def _declared_multiple(net: nn.Module) -> int:
    declared: Any = getattr(net, "multiple_of", None) or getattr(net, "window_size", None)
    if declared is None:  # BasicSR's SwinIR leaves it to its blocks
        windows = (getattr(module, "window_size", None) for module in net.modules())
        declared = math.lcm(*(window for window in windows if isinstance(window, int)))
    return int(declared)
