"""The loader of the training set, and the run's position in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from basicsr.data import worker_init_fn
from torch.utils.data import DataLoader

from kdsr.data.batch_plan import BatchPlan, PlannedBatches, last_epoch
from kdsr.data.patches import collate
from kdsr.data.samplers import PositionSampler
from kdsr.runtime.stopping import hide_lost_connections, ignore_stop_signals


class TrainingData:
    """The training set in batches, from the run's position on.

    Args:
        opt: The parsed options.
        dataset: The training set, indexed by ``(epoch, position, gt_size)``.
        state: The state to resume from, if any; its ``epoch`` is set to the loop's first epoch.
    """

    def __init__(self, opt: dict[str, Any], dataset: Any, state: dict[str, Any] | None) -> None:
        train_opt = opt["datasets"]["train"]
        self.plan = BatchPlan(train_opt, opt["train"].get("accumulate", 1))
        ratio = train_opt.get("dataset_enlarge_ratio", 1)
        self.sampler = PositionSampler(dataset, opt["world_size"], opt["rank"], ratio, opt["manual_seed"])
        done = state["iter"] if state else 0
        if state is not None:
            self._resume(state)
        total = int(opt["train"]["total_iter"])
        self.last_epoch = last_epoch(self.sampler, self.plan, done, total)
        workers = train_opt["num_worker_per_gpu"]
        first = partial(worker_init_fn, num_workers=workers, rank=opt["rank"], seed=opt["manual_seed"])
        # replaced by workers_warning, once for all processes
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        # Not BasicSR's build_dataloader: it has no growing batches, and an unreadable image silently kills its
        # prefetch thread ("cpu"), so that the run hangs.
        self.loader = DataLoader(
            dataset,
            batch_sampler=PlannedBatches(self.sampler, self.plan, done),
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=partial(_start_worker, first),
            pin_memory=train_opt.get("pin_memory", True) and opt["num_gpu"] > 0,
            persistent_workers=train_opt.get("persistent_workers", True) and workers > 0,
            # Else each epoch draws from torch's global generator, and a resumed run starts one more epoch.
            generator=torch.Generator().manual_seed(opt["manual_seed"]),
        )

    def _resume(self, state: dict[str, Any]) -> None:
        iteration, ranks = state["iter"], self.sampler.num_replicas
        if "position" in state:
            epoch, samples = state["position"]["epoch"], state["position"]["samples"]
        else:  # BasicSR's own states
            batch = self.plan.at(iteration).batch_size
            epoch, done = divmod(iteration, max(self.sampler.num_samples // batch, 1))
            samples = done * batch * ranks
        self.sampler.resume(epoch, samples)
        if self.plan.batches(iteration + 1, self.sampler.left(epoch)) == 0:
            self.sampler.resume(epoch + 1, 0)  # the epoch is complete
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
    ignore_stop_signals()
    hide_lost_connections()
    then(worker_id)


def end_workers(batches: Any) -> None:
    """Ends the worker processes of a ``DataLoader`` iterator, if any, and waits for them.

    Otherwise persistent workers live as long as anything refers to the iterator.
    """
    workers = getattr(batches, "_workers", ())
    try:
        if workers:
            batches._shutdown_workers()  # no public API
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()  # before kill(), which torch reports as an error
                worker.join(1)
                worker.kill()
