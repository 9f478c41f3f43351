"""Batch size and patch size per iteration: constant, or Restormer's progressive schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Sampler

from kdsr.data.dataset_options import DatasetOptions
from kdsr.data.samplers import PositionSampler
from kdsr.runtime.declarations import check_value, is_kind


@dataclass(frozen=True)
class Stage:
    """A stage of a training run."""

    after: int  # the last iteration before the stage
    gt_size: int | None  # side of the GT patches; None: the data set's own
    batch_size: int  # images of an iteration, per process


class BatchPlan:
    """The stages of a training run.

    ``progressive: [{after: 92000, gt_size: 160, batch_size_per_gpu: 5}, ...]`` lists changes after iterations
    (progressive learning, Zamir et al., "Restormer", CVPR 2022, section 4); ``gt_size`` and ``batch_size_per_gpu``
    apply before the first one. A stage continues in the data where the previous one ends.

    Args:
        opt: Checked options of the training set.
        accumulate: Batches of ``batch_size_per_gpu`` images in an iteration (``train.accumulate``).
    """

    def __init__(self, opt: Mapping[str, Any], accumulate: int = 1) -> None:
        self.stages = [Stage(0, opt.get("gt_size"), opt["batch_size_per_gpu"] * accumulate)]
        for later in opt.get("progressive") or ():
            before = self.stages[-1]
            size = later.get("gt_size", before.gt_size)
            given = later.get("batch_size_per_gpu")
            batch = before.batch_size if given is None else int(given) * accumulate
            self.stages.append(Stage(int(later["after"]), None if size is None else int(size), batch))

    def at(self, iteration: int) -> Stage:
        """The stage of an iteration, counted from 1."""
        return next(stage for stage in reversed(self.stages) if iteration > stage.after)

    def batches(self, iteration: int, samples: int) -> int:
        """Number of full batches in ``samples`` positions, starting at ``iteration``."""
        count = 0
        for index, stage in enumerate(self.stages):
            last = self.stages[index + 1].after if index + 1 < len(self.stages) else None
            if last is not None and iteration > last:
                continue
            most = samples // stage.batch_size
            made = most if last is None else min(most, last - iteration + 1)
            count, iteration, samples = count + made, iteration + made, samples - made * stage.batch_size
            if made == most:
                break
        return count

    @property
    def largest_batch(self) -> int:
        return max(stage.batch_size for stage in self.stages)

    @property
    def patches(self) -> list[int]:
        """The sides of the GT patches, in the order of the stages."""
        return list(dict.fromkeys(stage.gt_size for stage in self.stages if stage.gt_size is not None))


def progressive_problems(opt: Mapping[str, Any], place: str) -> list[str]:
    """Problems of the option ``progressive`` of a training set; ``place`` is its name in messages."""
    problems: list[str] = []
    stages = opt.get("progressive")
    if not check_value(stages, DatasetOptions.declared()["progressive"], place, problems) or not stages:
        return problems
    before = 0
    for index, stage in enumerate(stages):
        if stage["after"] <= before:
            problems.append(f"{place}.{index}.after: {stage['after']} must be greater than {before}")
        before = stage["after"]
        if "gt_size" in stage and opt.get("gt_size") is None:
            problems.append(
                f"{place}.{index}.gt_size: the data set itself needs a gt_size, for the first iterations"
            )
    return problems


def patch_sizes(train: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The sides of the GT patches of a training set with the options that say so, as far as they are numbers."""
    stages = train.get("progressive")
    sections = {"datasets.train": train} | {
        f"datasets.train.progressive.{index}": stage
        for index, stage in enumerate(stages if isinstance(stages, list) else [])
        if isinstance(stage, dict)
    }
    sizes: dict[str, Any] = {
        f"{place}.gt_size": section.get("gt_size") for place, section in sections.items()
    }
    return [(place, int(size)) for place, size in sizes.items() if is_kind(size, int) and size > 0]


class PlannedBatches(Sampler[list[tuple[int, int, int | None]]]):
    """Yields batches as lists of ``(epoch, position, gt_size)``; drops the last incomplete batch of an epoch.

    ``done`` is the number of iterations already made.
    """

    def __init__(self, sampler: PositionSampler, plan: BatchPlan, done: int = 0) -> None:
        self.sampler = sampler
        self.plan = plan
        self.done = done

    def __iter__(self) -> Iterator[list[tuple[int, int, int | None]]]:
        positions = list(self.sampler)
        start = 0
        while start + (stage := self.plan.at(self.done + 1)).batch_size <= len(positions):
            batch = positions[start : start + stage.batch_size]
            start += stage.batch_size
            self.done += 1
            yield [(epoch, position, stage.gt_size) for epoch, position in batch]

    def __len__(self) -> int:
        """Batches of an epoch in the current stage."""
        return self.sampler.num_samples // self.plan.at(self.done + 1).batch_size


def last_epoch(sampler: PositionSampler, plan: BatchPlan, done: int, total: int) -> int:
    """The epoch of iteration ``total``, for a run that has made ``done`` iterations and resumes at ``sampler``.

    Raises:
        ValueError: An epoch has fewer positions than a batch.
    """
    if sampler.num_samples < plan.largest_batch:
        raise ValueError(f"{sampler.num_samples} positions per process, {plan.largest_batch} in a batch")
    epoch = sampler.resume_epoch
    done += plan.batches(done + 1, sampler.left(epoch))
    while done < total:
        epoch += 1
        stage = plan.at(done + 1)
        if stage is plan.stages[-1]:  # all further epochs are equal
            return epoch - 1 + -(-(total - done) // (sampler.num_samples // stage.batch_size))
        done += plan.batches(done + 1, sampler.num_samples)
    return epoch
