"""Logs mean losses, and steps that were not finite with their images; ends a run with too many of them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from basicsr.utils import get_root_logger
from torch import Tensor

from kdsr.runtime.distributed import gather_lists, is_joined
from kdsr.runtime.errors import TrainingError
from kdsr.runtime.step_guard import StepGuard, StepRecord

SHOWN = 10  # steps that the last message lists


class _Failure(NamedTuple):
    """What a process knows of a step that was not finite."""

    iteration: int
    rank: int
    losses: dict[str, float]  # only those not finite
    norms: dict[str, float]
    images: list[str]


class StepLog:
    """Logs steps that were not finite, as recorded by ``guard``, and ends a run with too many in a row."""

    def __init__(self, guard: StepGuard, rank: int = 0) -> None:
        self.guard = guard
        self.rank = rank
        self._lines: deque[str] = deque(maxlen=min(SHOWN, guard.limit))
        self._last = 0  # iteration

    def check(self, save: Callable[[], Path]) -> None:
        """Logs the steps since the last call that were not finite; ends a run with too many in a row. Collective.

        Raises:
            TrainingError: ``train.max_nonfinite`` steps in a row. ``save`` has then saved the state from before the
                first of them, and returned its file.
        """
        problems = self.read()
        if not problems:
            return
        self.guard.try_again()  # else a run resumed from the state would stop at once
        state = save()
        raise TrainingError(
            [
                f"{problems[0]} (train.max_nonfinite: {self.guard.limit}). Lower train.optim_g.lr, set "
                "train.clip_grad_norm, use precision.amp: bf16 or none, or look at the images; the same command with "
                f"--auto_resume then resumes from {state}, with the weights from before",
                *problems[1:],
            ]
        )

    def read(self) -> list[str]:
        """Logs the steps since the last call that were not finite. Collective; one device read if there are none.

        Returns lines that say why the run cannot continue; none if it can.
        """
        counters = [self.guard.skipped, self.guard.in_a_row]
        flags = [step.failed.to(torch.int64) for step in self.guard.records]
        *failed, skipped, in_a_row = torch.stack([*flags, *counters]).tolist()
        steps, self.guard.records = self.guard.records, []
        if any(failed):
            mine = [self._failure(step) for step, flag in zip(steps, failed, strict=True) if flag]
            everyones = sorted(gather_lists(mine), key=lambda failure: (failure.iteration, failure.rank))
            logged = skipped - sum(failed)
            for iteration, group in itertools.groupby(everyones, key=lambda failure: failure.iteration):
                logged += 1
                self._log_step(iteration, list(group), logged)
        if in_a_row < self.guard.limit:
            return []
        first = self._last - in_a_row + 1
        return [
            f"iterations {first} to {self._last} were not finite; their updates were skipped",
            *self._lines,
        ]

    def _failure(self, step: StepRecord) -> _Failure:
        losses, norms = (
            {name: float(value) for name, value in values.items() if not value.float().isfinite()}
            for values in (step.losses, step.norms)
        )
        return _Failure(step.iteration, self.rank, losses, norms, list(step.images))

    def _log_step(self, iteration: int, failures: list[_Failure], skipped: int) -> None:
        self._last = iteration
        overflow = not any(failure.losses for failure in failures)
        # Gradients are averaged over all processes: the images that caused a bad gradient are unknown.
        failures = [failure for failure in failures if overflow or failure.losses]
        many = len(failures) > 1
        causes = "; ".join(_describe(failure, many or failure.rank > 0) for failure in failures)
        line = f"iteration {iteration}: {causes}"
        self._lines.append(line)
        begin = f"Update skipped, {skipped} so far:"
        if overflow and self.guard.loss_scale is not None:
            get_root_logger().info(f"{begin} the gradients overflow fp16, the loss scale is halved; {line}")
        else:
            get_root_logger().warning(f"{begin} not finite in {line}")


def _describe(failure: _Failure, many: bool) -> str:
    terms = ", ".join(f"{name}: {value}" for name, value in (failure.losses or failure.norms).items())
    whose = f"images of rank {failure.rank}" if many else "images"
    return f"{terms}; {whose}: {', '.join(failure.images)}" if failure.images else terms


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars by name, averaged over all ranks. Collective; one device read."""
    if not values:
        return {}
    stacked = torch.stack([value.float() for value in values.values()])
    if is_joined():
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(values, stacked.tolist(), strict=True))
