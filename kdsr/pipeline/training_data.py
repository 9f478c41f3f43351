"""The loader of the training set, and where in the data a run is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from basicsr.data import worker_init_fn
from torch.utils.data import DataLoader

from kdsr.data.batch_plan import BatchPlan, PlannedBatches, last_epoch
from kdsr.data.samplers import PositionSampler
from kdsr.runtime.stopping import quiet_when_the_reader_is_gone, spare_worker


class TrainingData:
    """The training set in batches, from the position on where a run is.

    Args:
        opt: The parsed options.
        dataset: The training set, which takes ``(epoch, position, gt_size)``.
        state: The state that the run goes on from; its ``epoch`` is set to the one that the loop begins with.
    """

    def __init__(self, opt: dict[str, Any], dataset: Any, state: dict[str, Any] | None) -> None:
        train_opt = opt["datasets"]["train"]
        self.plan = BatchPlan(train_opt)
        ratio = train_opt.get("dataset_enlarge_ratio", 1)
        self.sampler = PositionSampler(dataset, opt["world_size"], opt["rank"], ratio, opt["manual_seed"])
        done = state["iter"] if state else 0
        if state is not None:
            self._go_on_from(state)
        total = int(opt["train"]["total_iter"])
        self.last_epoch = last_epoch(self.sampler, self.plan, done, total)
        workers = train_opt["num_worker_per_gpu"]
        first = partial(worker_init_fn, num_workers=workers, rank=opt["rank"], seed=opt["manual_seed"])
        # workers_warning covers this, once for all processes; torch warns twice in each of them
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        # Not BasicSR's build_dataloader: it knows no batches that grow, and its reading thread ("cpu") dies
        # of an unreadable image in silence, and the run hangs.
        self.loader = DataLoader(
            dataset,
            batch_sampler=PlannedBatches(self.sampler, self.plan, done),
            num_workers=workers,
            worker_init_fn=partial(_start_worker, first),
            pin_memory=train_opt.get("pin_memory", False),
            persistent_workers=train_opt.get("persistent_workers", False) and workers > 0,
            # Else each start of an epoch draws from torch's global generator, and a resumed run starts one more.
            generator=torch.Generator().manual_seed(opt["manual_seed"]),
        )

    def _go_on_from(self, state: dict[str, Any]) -> None:
        iteration, ranks = state["iter"], self.sampler.num_replicas
        if "position" in state:
            epoch, samples = state["position"]["epoch"], state["position"]["samples"]
        else:  # BasicSR's own states
            batch = self.plan.at(iteration).batch_size
            epoch, done = divmod(iteration, max(self.sampler.num_samples // batch, 1))
            samples = done * batch * ranks
        self.sampler.resume(epoch, samples)
        if self.plan.batches(iteration + 1, self.sampler.left(epoch)) == 0:
            self.sampler.resume(epoch + 1, 0)  # at the end of an epoch, or of a shorter one
        state["epoch"] = self.sampler.resume_epoch

    def describe(self) -> str:
        """Batches and epochs, for the log."""
        stages = [
            f"{stage.batch_size}" + (f" from iteration {stage.after + 1}" if stage.after else "")
            for stage in self.plan.stages
        ]
        return (
            f"\n\tBatch size per process: {', '.join(stages)}\n\tProcesses: {self.sampler.num_replicas}"
            f"\n\tIterations per epoch: {len(self.loader)}\n\tTotal epochs: {self.last_epoch + 1}"
        )


def _start_worker(then: Callable[[int], None], worker_id: int) -> None:
    spare_worker(worker_id)
    quiet_when_the_reader_is_gone()
    then(worker_id)


def end_workers(batches: Any) -> None:
    """Ends the processes of an iterator of a ``DataLoader``, and waits for that; without effect if it has none.

    Workers that persist, or that read ahead when a run is stopped, would otherwise be left to the exit of Python,
    where whatever still refers to the iterator keeps them alive.
    """
    workers = getattr(batches, "_workers", ())
    try:
        if workers:
            batches._shutdown_workers()  # torch has no public way
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()  # first: torch reports one that is killed as an error
                worker.join(1)
                worker.kill()
