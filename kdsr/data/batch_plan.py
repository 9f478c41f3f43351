"""Batch size and patch size per iteration: constant, or Restormer's progressive schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Sampler

from kdsr.data.samplers import PositionSampler


@dataclass(frozen=True)
class Stage:
    """A stage of a training run.

    Attributes:
        after: The last iteration before the stage.
        gt_size: Side of the GT patches; None: the data set's own.
        batch_size: Images per process.
    """

    after: int
    gt_size: int | None
    batch_size: int


class BatchPlan:
    """The stages of a training run.

    ``progressive: [{after: 92000, gt_size: 160, batch_size_per_gpu: 5}, ...]`` lists changes after iterations
    (progressive learning, Zamir et al., "Restormer", CVPR 2022, section 4); ``gt_size`` and ``batch_size_per_gpu``
    apply before the first one. A stage continues in the data where the previous one ends.

    Args:
        opt: Checked options of the training set.
    """

    def __init__(self, opt: Mapping[str, Any]) -> None:
        self.stages = [Stage(0, opt.get("gt_size"), opt["batch_size_per_gpu"])]
        for later in opt.get("progressive") or ():
            before = self.stages[-1]
            size = later.get("gt_size", before.gt_size)
            batch = int(later.get("batch_size_per_gpu", before.batch_size))
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
    stages = opt.get("progressive")
    if stages is None:
        return []
    if not isinstance(stages, list):
        return [f"{place}: expected a list of sections, each with {', '.join(_KEYS)}"]
    problems = []
    before = 0
    for index, stage in enumerate(stages):
        here = f"{place}.{index}"
        if not isinstance(stage, dict) or "after" not in stage or not set(stage) <= set(_KEYS):
            problems.append(f"{here}: expected a section with {', '.join(_KEYS)}; got {stage!r}")
            continue
        wrong = [key for key, value in stage.items() if not _is_count(value)]
        problems += [f"{here}.{key}: {stage[key]!r} is not a positive whole number" for key in wrong]
        if "after" not in wrong:
            if stage["after"] <= before:
                problems.append(f"{here}.after: {stage['after']} must be greater than {before}")
            before = stage["after"]
        if "gt_size" in stage and not _is_count(opt.get("gt_size")):
            problems.append(f"{here}.gt_size: the data set itself needs a gt_size, for the first iterations")
    return problems


_KEYS = ("after", "gt_size", "batch_size_per_gpu")


def _is_count(value: Any) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value > 0


class PlannedBatches(Sampler[list[tuple[int, int, int | None]]]):
    """Yields batches as lists of ``(epoch, position, gt_size)``; drops the last incomplete batch of an epoch.

    Args:
        sampler: Yields the positions.
        plan: The batch sizes.
        done: Iterations already made.
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
