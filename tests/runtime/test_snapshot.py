"""A trial of objects can be undone, whatever they hold."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from kdsr.runtime.snapshot import left_unchanged


class Holder:
    """As a model or a term of a user's may be."""

    def __init__(self) -> None:
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
        self.array = np.zeros(3)
        self.fixed = np.zeros(3)
        self.fixed.flags.writeable = False
        self.counts = Counter(a=1)
        self.drawing = {
            "torch": torch.Generator(),
            "numpy": np.random.default_rng(1),
            "older": np.random.RandomState(1),
            "python": random.Random(1),
        }

    def step(self) -> list[Any]:
        """Changes everything, and returns what it is afterwards."""
        self.net(torch.ones(2, 3, 4, 4)).sum().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.array += 1
        self.counts["b"] += 1
        self.net[0].bias.requires_grad_(False)
        self.later = getattr(self, "later", 0) + 1
        draws = self.drawing
        return [
            *(value.tolist() for value in self.net.state_dict().values()),
            self.optimizer.param_groups[0]["lr"],
            [state["step"].item() for state in self.optimizer.state.values()],
            self.array.tolist(),
            dict(self.counts),
            self.later,
            torch.rand((), generator=draws["torch"]).item(),
            draws["numpy"].random(),
            draws["older"].rand(),
            draws["python"].random(),
        ]


def test_a_step_after_a_trial_is_the_first() -> None:
    holder = Holder()
    with left_unchanged(holder):
        tried = holder.step()
        assert all(one != other for one, other in zip(tried[-9:], holder.step()[-9:], strict=True))
    assert holder.step() == tried


def test_a_trial_that_fails_is_undone() -> None:
    holder = Holder()
    with pytest.raises(ValueError, match="no"), left_unchanged(holder):
        holder.array += 1
        raise ValueError("no")
    assert holder.array.tolist() == [0, 0, 0]
