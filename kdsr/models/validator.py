"""Validator: measures networks on whole data sets and records the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_root_logger

from kdsr.models.evaluation import EvaluationSettings, ImageResult, evaluate, mean_baseline, mean_values
from kdsr.models.image_metrics import baseline_name
from kdsr.models.metrics_file import BASELINE, append_csv, forget_after, recorded_means
from kdsr.models.restored_images import Restore
from kdsr.models.sections import ValOptions
from kdsr.models.teacher_check import teacher_warnings
from kdsr.runtime.distributed import on_first_rank
from kdsr.runtime.errors import DataError


class Validator:
    """Measures every image of a set, shared among the ranks; writes the values to ``metrics.csv`` and TensorBoard.

    Args:
        opt: The parsed options.
        device: Where the run computes.
        restore: Runs the network under test on images of any size.
        has_baseline: False if outputs are compared with the input.

    Attributes:
        best: The best mean values so far, by set and metric: ``{better, val, iter}``.
        before: Called before a validation; set by the pipeline.
        failed: Called if an image could not be measured; set by the pipeline.
        save_best: Called in training if the weights are the best so far according to ``logger.save_best``, with set,
            metric, value and iteration.
    """

    def __init__(
        self,
        opt: dict[str, Any],
        device: torch.device,
        restore: Restore,
        *,
        has_baseline: bool = True,
    ) -> None:
        self.opt = opt
        self.device = device
        self.restore = restore
        self.has_baseline = has_baseline
        self.is_train: bool = opt["is_train"]
        self.scale: int = opt.get("scale") or 1
        self.best: dict[str, dict[str, Any]] = {}
        self.before: Callable[[], None] | None = None
        self.failed: Callable[[], None] | None = None
        self.save_best: Callable[[dict[str, Any]], None] | None = None
        self._validated: set[tuple[str, Any]] = set()
        self._baselines: dict[str, dict[str, float]] = {}  # mean values by set
        self._of_images: dict[str, dict[int, dict[str, float]]] = {}  # the baseline of each image, by set

    def validate(
        self, dataloader: Any, iteration: int | str, tb_logger: Any, save_img: bool = False
    ) -> dict[str, float]:
        """Validates on all ranks. A second call for a set and iteration does nothing: BasicSR calls twice at the end.

        Args:
            dataloader: BasicSR's loader of a validation or test set.
            iteration: The last iteration of the training, in a test the name of the run.
            tb_logger: TensorBoard's writer, or None.
            save_img: Whether the restored images are saved.

        Returns:
            The mean values by metric.

        Raises:
            DataError: An image cannot be read, written or measured; on every rank.
            TrainingError: The output for an image is not finite; on every rank.
        """
        name = dataloader.dataset.opt["name"]
        if (name, iteration) in self._validated:
            return {}
        self._validated.add((name, iteration))
        if self.before is not None:
            self.before()
        try:
            results = self.measure(self.restore, dataloader, iteration, self._tested_network(), save_img)
        except DataError:  # on all ranks; the weights are valid, so the pipeline saves them
            if self.failed is not None:
                self.failed()
            raise
        means = mean_values(results)
        if means and self.is_train:
            # Save the best checkpoint first: a resumed run does not repeat a validation that is in metrics.csv.
            self._update_best(name, means, iteration)
        self.record(iteration, "student", name, results)
        if means:
            self._log_means(f"Validation {name}", means, name, with_best=self.is_train)
        if means and self.is_train and tb_logger:
            for tag, value in self._scalars(name, means, results).items():
                tb_logger.add_scalar(tag, value, iteration)
        return means

    def validate_due(self, dataloaders: list[Any], iteration: int, tb_logger: Any) -> None:
        """After a resume, runs the missing validations of the state's iteration.

        Validations in ``metrics.csv`` are not repeated, but their best values are used: the state was saved before.
        """
        val = self.opt["val"]
        names = [dataloader.dataset.opt["name"] for dataloader in dataloaders]

        def recorded() -> list[dict[str, float]]:
            return [recorded_means(self.metrics_file, iteration, name) for name in names]

        # Rank 0 reads for all: other ranks may not have the file.
        for dataloader, name, means in zip(dataloaders, names, on_first_rank(recorded), strict=True):
            if means:
                self._update_best(name, means, iteration)
                self._validated.add((name, iteration))
            elif iteration % val["val_freq"] == 0:
                self.validate(dataloader, iteration, tb_logger, val["save_img"])

    def validate_teacher(self, dataloaders: list[Any], restore: Restore, place: str = "network_t") -> None:
        """Validates the teacher like the student, to find a wrong range, scale or key early.

        Args:
            dataloaders: BasicSR's loaders of the validation sets.
            restore: Runs the teacher on images of any size.
            place: Its key in the options; ``network_t.1`` is recorded as ``teacher.1``.
        """
        which = place.removeprefix("network_t")
        for dataloader in dataloaders:
            name = dataloader.dataset.opt["name"]
            results = self.measure(restore, dataloader, 0, f"the teacher{which and f' {place}'}")
            self.record(0, f"teacher{which}", name, results)
            self._log_means(
                f"Validation of the teacher{which and f' {place}'}, {name}", mean_values(results), name
            )
            # the baseline is measured beside the first teacher only
            of_images = self._of_images.setdefault(name, {each.index: each.baseline for each in results})
            results = [replace(each, baseline=of_images[each.index]) for each in results]
            for line in teacher_warnings({f"{name}{which and f', {place},'}": results}, self.opt):
                get_root_logger().warning(line)

    def resume(self, iteration: int) -> None:
        """Removes the values of later iterations, which the resumed run measures again. Collective."""
        on_first_rank(lambda: forget_after(self.metrics_file, iteration))

    def _tested_network(self) -> str:
        """Returns the name of the network under test, for messages."""
        if not self.is_train:
            return "the tested network"
        return "the student's EMA" if self.opt["train"].get("ema_decay", 0) > 0 else "the student"

    def _update_best(self, name: str, means: dict[str, float], iteration: int | str) -> None:
        """Updates ``best`` with the mean values of a set.

        If a resumed run has other metrics, the best values of the common ones are kept.
        """
        before = self.best.pop(name, {})
        metrics = self.opt["val"].get("metrics")
        if not metrics:
            return
        best = self.best[name] = {}
        for metric, options in metrics.items():
            better = options.get("better", "higher")
            worst = float("-inf") if better == "higher" else float("inf")
            kept = before.get(metric, {})
            best[metric] = (
                kept if kept.get("better") == better else {"better": better, "val": worst, "iter": -1}
            )
            value = means.get(metric)
            if value is None:
                continue
            if value >= best[metric]["val"] if better == "higher" else value <= best[metric]["val"]:
                best[metric] |= {"val": value, "iter": iteration}
        wanted = self.opt["logger"].get("save_best") or {}
        if self.save_best is None or wanted.get("set") != name or wanted["metric"] not in means:
            return
        if best[wanted["metric"]]["iter"] == iteration:
            self.save_best({**wanted, "iteration": iteration, "value": best[wanted["metric"]]["val"]})

    def measure(
        self, restore: Restore, dataloader: Any, iteration: int | str, network: str, save_img: bool = False
    ) -> list[ImageResult]:
        """Measures every image of a set on all ranks, and the baseline if its values are unknown."""
        name = dataloader.dataset.opt["name"]
        metrics = self.opt["val"].get("metrics") or {}
        if name not in self._baselines:
            self._baselines[name] = on_first_rank(
                lambda: recorded_means(self.metrics_file, 0, name, BASELINE)
            )
        known = self._baselines[name]
        unknown = {key: metric for key, metric in metrics.items() if self.has_baseline and key not in known}
        results = evaluate(
            restore,
            dataloader,
            EvaluationSettings(
                metrics, unknown, self.scale, network, batch_size=ValOptions.read(self.opt["val"]).batch_size
            ),
            self.device,
            rank=self.opt["rank"],
            world_size=self.opt["world_size"],
            save_to=(lambda image: self._image_path(name, image, iteration)) if save_img else None,
        )
        known |= mean_baseline(results)
        self._warn_about_baseline(name, results)
        return results

    def _warn_about_baseline(self, name: str, results: list[ImageResult]) -> None:
        failed = [
            f"{result.image} ({metric}: {why})"
            for result in results
            for metric, why in result.unmeasured.items()
        ]
        if failed:
            more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
            get_root_logger().warning(
                f"{name}: no {baseline_name(self.scale)} baseline of "
                f"{', '.join(failed[:3])}{more}; the baseline's mean is that of the other images. "
                "An input that equals its ground truth may be in the wrong folder"
            )

    def record(self, iteration: int | str, network: str, name: str, results: list[ImageResult]) -> None:
        """Adds the values of each image to ``metrics.csv``, in training also a new baseline."""
        if not self.is_train:  # the file of a test has rows of the tested network only
            results = [replace(result, baseline={}) for result in results]
        on_first_rank(lambda: append_csv(self.metrics_file, iteration, network, name, results))

    def _log_means(self, title: str, values: dict[str, float], name: str, with_best: bool = False) -> None:
        """Logs the mean values of a set with the baseline and, for the student, the best values so far."""
        baseline = self._baselines.get(name, {})
        lines = [title]
        for metric, value in values.items():
            line = f"\t # {metric}: {value:.4f}"
            if metric in baseline:
                line += f" ({baseline_name(self.scale)} {baseline[metric]:.4f})"
            if with_best:
                best = self.best[name][metric]
                line += f"\tBest: {best['val']:.4f} @ {best['iter']} iter"
            lines.append(line)
        get_root_logger().info("\n".join(lines) + "\n")

    def _scalars(self, name: str, means: dict[str, float], results: list[ImageResult]) -> dict[str, float]:
        """Returns the values of a validation by their TensorBoard tags."""
        tagged = {"metrics": means, "baseline": self._baselines.get(name, {})}
        scalars = {
            f"{tag}/{name}/{key}": value for tag, values in tagged.items() for key, value in values.items()
        }
        for result in results:
            scalars |= {f"images/{name}/{key}/{result.image}": value for key, value in result.values.items()}
        return scalars

    @property
    def metrics_file(self) -> Path:
        """``metrics.csv`` in the run's folder."""
        return Path(self.opt["path"]["experiments_root" if self.is_train else "results_root"]) / "metrics.csv"

    def _image_path(self, name: str, image: str, iteration: int | str) -> Path:
        """Returns BasicSR's path of a saved image; in training with the set's name, which BasicSR omits."""
        folder = Path(self.opt["path"]["visualization"], name)
        if self.is_train:
            return folder / image / f"{Path(image).name}_{iteration}.png"
        suffix = self.opt["val"].get("suffix") or self.opt["name"]
        return folder / f"{image}_{suffix}.png"
