"""Between two iterations of BasicSR's loop: position in the data, due validations, stop signals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from basicsr.utils import get_root_logger

from kdsr.data.patches import to_device
from kdsr.models.trainer import LoopInterface
from kdsr.pipeline.bad_images import ReplacedImages
from kdsr.pipeline.resume import set_aside_later
from kdsr.pipeline.training_data import TrainingData
from kdsr.runtime.atomic_files import remove_temporaries
from kdsr.runtime.distributed import on_first_rank
from kdsr.runtime.errors import Stopped
from kdsr.runtime.stopping import StopRequest, blocked_signals


class TrainingLoop:
    """Tracks the iteration and position of a training run, and stops it after a signal.

    Args:
        opt: The parsed options.
        model: The model.
        data: The training set with the run's position.
        stop: The stop request.
        resumed: The iteration that the run resumes from; None for a new run.
    """

    def __init__(
        self,
        opt: dict[str, Any],
        model: Any,
        data: TrainingData,
        stop: StopRequest,
        resumed: int | None,
    ) -> None:
        self.opt = opt
        self.model = model
        self.data = data
        self.sampler = data.sampler
        self.stop = stop
        self.resumed = resumed
        self.iteration = resumed or 0
        self.samples = 0
        self.saved = True  # whether this iteration's state is saved
        if isinstance(model, LoopInterface):
            model.validator.before = self.save_if_asked
            model.validator.failed = self.save_in_time

    def start(self, val_loaders: list[Any], tb_logger: Any) -> None:
        """Before the first iteration: makes up for a killed run's missing validation and removes its leftovers."""
        self.stop.training = True
        if self.resumed is None or not isinstance(self.model, LoopInterface):
            return
        # torch's warning about the call order does not apply to a resumed schedule
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for line in on_first_rank(self._clean_up):
            get_root_logger().info(line)
        if self.opt.get("val"):
            self.model.validator.validate_due(val_loaders, self.iteration, tb_logger)
        self.stop_if_asked()

    def _clean_up(self) -> list[str]:
        path = self.opt["path"]
        for folder in (path["models"], path["training_states"], path["experiments_root"]):
            remove_temporaries(folder)
        if self.opt["auto_resume"]:
            return []  # later states are damaged and were skipped
        return set_aside_later(Path(path["training_states"]), self.iteration)

    def begin_epoch(self) -> None:
        resumed_here = self.sampler.epoch == self.sampler.resume_epoch
        self.samples = self.sampler.resume_after if resumed_here else 0

    def begin_iteration(self) -> None:
        """A batch is about to be trained on."""
        self.iteration += 1
        self.samples += self.data.plan.at(self.iteration).batch_size * self.sampler.num_replicas
        self.saved = False
        if isinstance(self.model, LoopInterface):
            position = {"epoch": self.sampler.epoch, "samples": self.samples}
            self.model.trainer.checkpointer.position = position

    def end_iteration(self) -> None:
        """An iteration is over, including its save and validation."""
        if self.iteration % self.opt["logger"]["save_checkpoint_freq"] == 0:
            self.saved = True
        self.stop_if_asked()

    def save_if_asked(self) -> None:
        """Before a validation, which may take longer than the time left after a signal: saves the state first."""
        if self.stop.agreed():
            self.save_in_time()

    def save_in_time(self) -> None:
        """Saves this iteration's state, unless the training is over."""
        if self.iteration <= int(self.opt["train"]["total_iter"]):
            self._save()

    def stop_if_asked(self) -> None:
        """Saves the state and raises ``Stopped`` on all ranks if any of them has received a stop signal."""
        name = self.stop.agreed()
        if name is None:
            return
        self._save()
        raise Stopped(
            f"{name}: stopped after iteration {self.iteration}, its state is saved; "
            "the same command with --auto_resume continues"
        )

    def _save(self) -> None:
        if not self.saved:
            get_root_logger().info("Saving models and training states.")
            self.model.save(self.sampler.epoch, self.iteration)
            self.saved = True


class LoopPrefetcher:
    """A prefetcher (``reset``, ``next``) that moves batches to the device and calls the training loop's hooks.

    Args:
        prefetcher: Provides the batches.
        loop: The hooks.
        tick: Called after each iteration (the progress line).
    """

    def __init__(self, prefetcher: Any, loop: TrainingLoop, tick: Callable[[], None]) -> None:
        self.prefetcher = prefetcher
        self.loop = loop
        self.tick = tick
        self.replaced = ReplacedImages()
        self.delivered = False

    def reset(self) -> None:
        self.loop.begin_epoch()
        self.replaced.begin_epoch()
        with blocked_signals():
            self.prefetcher.reset()
        self.delivered = False

    def next(self) -> dict[str, Any] | None:
        if self.delivered:
            self.tick()
            self.loop.end_iteration()
        batch = self.prefetcher.next()
        self.replaced.collect(batch)
        self.delivered = batch is not None
        if self.delivered:
            self.loop.begin_iteration()
            batch = to_device(batch, self.loop.model.device)
        return batch
