"""What happens between two iterations of BasicSR's loop: the position in the data, due validations, stopping."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from basicsr.utils import get_root_logger

from kdsr.models.trainer import LoopInterface
from kdsr.pipeline.bad_images import ReplacedImages
from kdsr.pipeline.resume import set_aside_later
from kdsr.pipeline.training_data import TrainingData
from kdsr.runtime.atomic_files import sweep_temporaries
from kdsr.runtime.distributed import on_first_rank
from kdsr.runtime.errors import Stopped
from kdsr.runtime.stopping import StopRequest, signals_held


class Loop:
    """Knows where a training is, and ends it in order when a signal asks for it.

    Args:
        opt: The parsed options.
        model: What is trained.
        data: The training set, and where the run is in it.
        stop: Whether to stop.
        resumed: The iteration that the run goes on from; None for a new one.
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
        self.saved = True  # whether the state of this iteration is on the disk
        if isinstance(model, LoopInterface):
            model.validator.before = self.save_if_asked
            model.validator.failed = self.save_in_time

    def begin(self, val_loaders: list[Any], tb_logger: Any) -> None:
        """Before the first iteration: what a killed run left undone is done, what it left lying is removed."""
        self.stop.training = True
        if self.resumed is None or not isinstance(self.model, LoopInterface):
            return
        # torch's advice on the order of two calls, which a schedule that goes on cannot follow
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for line in on_first_rank(self._tidy):
            get_root_logger().info(line)
        if self.opt.get("val"):
            self.model.validator.validate_due(val_loaders, self.iteration, tb_logger)
        self.stop_if_asked()

    def _tidy(self) -> list[str]:
        path = self.opt["path"]
        for folder in (path["models"], path["training_states"], path["experiments_root"]):
            sweep_temporaries(folder)
        if self.opt["auto_resume"]:
            return []  # later ones are damaged, and were skipped
        return set_aside_later(Path(path["training_states"]), self.iteration)

    def begin_epoch(self) -> None:
        resumed_here = self.sampler.epoch == self.sampler.resume_epoch
        self.samples = self.sampler.resume_after if resumed_here else 0

    def begin_iteration(self) -> None:
        """A batch goes to the model."""
        self.iteration += 1
        self.samples += self.data.plan.at(self.iteration).batch_size * self.sampler.num_replicas
        self.saved = False
        if isinstance(self.model, LoopInterface):
            position = {"epoch": self.sampler.epoch, "samples": self.samples}
            self.model.trainer.checkpointer.position = position

    def end_iteration(self) -> None:
        """An iteration is over, with what was to be saved and validated after it."""
        if self.iteration % self.opt["logger"]["save_checkpoint_freq"] == 0:
            self.saved = True
        self.stop_if_asked()

    def save_if_asked(self) -> None:
        """Before a validation, which may take longer than the time that is left: the state first."""
        if self.stop.agreed():
            self.save_in_time()

    def save_in_time(self) -> None:
        """Saves the state of this iteration, unless the training is over."""
        if self.iteration <= int(self.opt["train"]["total_iter"]):
            self._save()

    def stop_if_asked(self) -> None:
        """Ends the run on all ranks when a signal has asked any of them to.

        Raises:
            Stopped: With the state saved.
        """
        name = self.stop.agreed()
        if name is None:
            return
        self._save()
        raise Stopped(
            f"{name}: stopped after iteration {self.iteration}, its state is saved; "
            "the same command with --auto_resume goes on"
        )

    def _save(self) -> None:
        if not self.saved:
            get_root_logger().info("Saving models and training states.")
            self.model.save(self.sampler.epoch, self.iteration)
            self.saved = True


class LoopPrefetcher:
    """A prefetcher (``reset``, ``next``), which the loop asks when it is done with an iteration.

    Args:
        prefetcher: Gives the batches.
        loop: Is told what happens.
        tick: Called after each iteration (the progress line).
    """

    def __init__(self, prefetcher: Any, loop: Loop, tick: Callable[[], None]) -> None:
        self.prefetcher = prefetcher
        self.loop = loop
        self.tick = tick
        self.replaced = ReplacedImages()
        self.delivered = False

    def reset(self) -> None:
        self.loop.begin_epoch()
        self.replaced.begin_epoch()
        with signals_held():
            self.prefetcher.reset()
        self.delivered = False

    def next(self) -> dict[str, Any] | None:
        if self.delivered:
            self.tick()
            self.loop.end_iteration()
        batch = self.prefetcher.next()
        self.replaced.take_from(batch)
        self.delivered = batch is not None
        if self.delivered:
            self.loop.begin_iteration()
        return batch
