"""Loss weights that change during training: steps and ramps over iterations."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

from torch import Tensor, nn

Points = list[tuple[int, float]]


def is_schedule(weight: Any) -> bool:
    """Whether an option ``loss_weight`` is a schedule rather than a number."""
    return isinstance(weight, list | dict)


def schedule_problems(weight: Any, place: str) -> list[str]:
    """What is wrong with a schedule; empty when ``ScheduledLoss`` can read it."""
    points = weight
    if isinstance(weight, dict):
        if set(weight) != {"ramp"}:
            return [f"{place}: {weight!r} is no schedule; {_FORMS}"]
        points = weight["ramp"]
    if not isinstance(points, list) or not points or not all(map(_is_point, points)):
        return [f"{place}: {weight!r} is no schedule; {_FORMS}"]
    iterations = [point[0] for point in points]
    if any(later <= sooner for sooner, later in zip(iterations, iterations[1:], strict=False)):
        return [f"{place}: the iterations {iterations} must grow from point to point"]
    return []


_FORMS = (
    "write steps [[0, 0.0], [5000, 0.1]] (from iteration 5,000 on 0.1) or {ramp: [[0, 0.0], [5000, 0.1]]}"
)


def _is_point(point: Any) -> bool:
    if not isinstance(point, list) or len(point) != 2 or any(isinstance(value, bool) for value in point):
        return False
    iteration, value = point
    return (
        isinstance(iteration, int)
        and iteration >= 0
        and isinstance(value, int | float)
        and math.isfinite(value)
    )


def weight_at(points: Points, ramp: bool, iteration: int) -> float:
    """The weight at an iteration (from 1): that of the last point reached, or linear to the next one with ``ramp``.

    Before the first point it is that of the first, after the last point that of the last.
    """
    reached = bisect_right([at for at, _ in points], iteration)
    if reached == 0:
        return float(points[0][1])
    start, weight = points[reached - 1]
    if not ramp or reached == len(points):
        return float(weight)
    end, goal = points[reached]
    return weight + (goal - weight) * (iteration - start) / (end - start)


class ScheduledLoss(nn.Module):
    """A loss whose weight follows a schedule. At weight 0 it is still computed, and multiplied by 0.

    So every step uses the same parameters, as DDP requires.

    Args:
        loss: A loss of weight 1 that returns a scalar, or a tuple whose first entry is one.
        schedule: ``[[iteration, weight], ...]``, or ``{ramp: [[iteration, weight], ...]}``.
    """

    def __init__(self, loss: nn.Module, schedule: Any) -> None:
        super().__init__()
        self.loss = loss
        self.ramp = isinstance(schedule, dict)
        self.points: Points = [tuple(point) for point in (schedule["ramp"] if self.ramp else schedule)]
        self.weight = weight_at(self.points, self.ramp, 1)

    def begin(self, iteration: int) -> None:
        """Sets the weight; called once before each step."""
        self.weight = weight_at(self.points, self.ramp, iteration)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = self.loss(*args, **kwargs)
        if isinstance(value, tuple):
            return (self._weighted(value[0]), *value[1:])
        return self._weighted(value)

    def _weighted(self, value: Tensor) -> Tensor:
        return value * self.weight
