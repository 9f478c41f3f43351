"""What is said of steps that were not finite: which terms, on which images; and when a run has to stop."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from basicsr.utils import get_root_logger
from torch import Tensor

from kdsr.runtime.distributed import gather_lists
from kdsr.runtime.step_guard import StepGuard

CAPACITY = 1000  # steps that are remembered between two readings
SHOWN = 10  # steps that the last message names one by one


class _Step(NamedTuple):
    """A step as it was, still on the device."""

    iteration: int
    names: list[str]
    values: Tensor  # the losses, then the norms of the gradients
    failed: Tensor
    images: Sequence[str]


class _Failure(NamedTuple):
    """What a process knows of a step that was not finite."""

    iteration: int
    rank: int
    losses: dict[str, float]  # those that were not finite
    norms: dict[str, float]
    images: list[str]


class StepLog:
    """Remembers the last steps without reading them, and tells of those that were not finite when it is asked.

    Args:
        guard: What decided about the steps.
        rank: Of this process.
    """

    def __init__(self, guard: StepGuard, rank: int = 0) -> None:
        self.guard = guard
        self.rank = rank
        self._steps: list[_Step] = []
        self._lines: deque[str] = deque(maxlen=min(SHOWN, guard.limit))
        self._last = 0  # iteration

    def note(self, iteration: int, losses: dict[str, Tensor], images: Sequence[str]) -> None:
        """Takes in a step that the guard has just decided about. Nothing is read from the device."""
        norms = self.guard.norms
        values = torch.stack([value.detach().float() for value in (*losses.values(), *norms.values())])
        self._steps.append(_Step(iteration, [*losses, *norms], values, self.guard.failed, images))

    def due(self) -> bool:
        """Whether ``tell`` should be called before the next step: it is full, or the run has to stop."""
        return len(self._steps) >= CAPACITY or (
            self.guard.made_on_host is False and int(self.guard.in_a_row) >= self.guard.limit
        )

    def tell(self) -> list[str]:
        """Logs the steps that were not finite since the last call. Collective; reads the device once if all were.

        Returns:
            Why the run cannot go on, a line each; empty when it can.
        """
        counters = [self.guard.skipped, self.guard.in_a_row]
        flags = [step.failed.to(torch.int64) for step in self._steps]
        *failed, skipped, in_a_row = torch.stack([*flags, *counters]).tolist()
        steps, self._steps = self._steps, []
        if any(failed):
            mine = [self._failure(step) for step, flag in zip(steps, failed, strict=True) if flag]
            everyones = sorted(gather_lists(mine), key=lambda failure: (failure.iteration, failure.rank))
            told = skipped - sum(failed)
            for iteration, group in itertools.groupby(everyones, key=lambda failure: failure.iteration):
                told += 1
                self._tell_one(iteration, list(group), told)
        if in_a_row < self.guard.limit:
            return []
        first = self._last - in_a_row + 1
        return [
            f"iterations {first} to {self._last} were not finite, and nothing was learned from them",
            *self._lines,
        ]

    def _failure(self, step: _Step) -> _Failure:
        finite = step.values.isfinite().tolist()
        wrong = {
            name: value
            for name, value, good in zip(step.names, step.values.tolist(), finite, strict=True)
            if not good
        }
        norms = {name: wrong.pop(name) for name in list(wrong) if name in self.guard.trained}
        return _Failure(step.iteration, self.rank, wrong, norms, list(step.images))

    def _tell_one(self, iteration: int, failures: list[_Failure], skipped: int) -> None:
        self._last = iteration
        overflow = not any(failure.losses for failure in failures)
        # Where only gradients are at fault, all processes have the same: which images they came from is not known.
        failures = [failure for failure in failures if overflow or failure.losses]
        said = "; ".join(_said(failure, many=len(failures) > 1 or failure.rank > 0) for failure in failures)
        line = f"iteration {iteration}: {said}"
        self._lines.append(line)
        if overflow and self.guard.loss_scale is not None:
            get_root_logger().info(
                f"Update skipped, {skipped} so far: the gradients overflow fp16, the loss scale is halved; {line}"
            )
        else:
            get_root_logger().warning(f"Update skipped, {skipped} so far: not finite in {line}")


def _said(failure: _Failure, many: bool) -> str:
    terms = ", ".join(f"{name}: {value}" for name, value in (failure.losses or failure.norms).items())
    whose = f"images of rank {failure.rank}" if many else "images"
    return f"{terms}; {whose}: {', '.join(failure.images)}" if failure.images else terms
