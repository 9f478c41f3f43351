"""Log messages about steps that were not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import pytest
import torch
from basicsr.utils import get_root_logger
from torch import nn

from kdsr.runtime.precision import LossScale
from kdsr.runtime.step_guard import CAPACITY, StepGuard, Trained
from kdsr.runtime.step_log import StepLog

CPU = torch.device("cpu")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def messages() -> Iterator[list[str]]:
    handler, logger = Lines(), get_root_logger()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.setLevel(level)
    logger.removeHandler(handler)


class Run:
    """Steps of one parameter, with the losses that are asked for."""

    def __init__(self, limit: int = 10, fused: bool = True, scaled: bool = False) -> None:
        self.net = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.0, fused=fused)
        self.guard = StepGuard(
            {"grad_norm": Trained(self.net, optimizer)},
            CPU,
            limit=limit,
            loss_scale=LossScale(CPU) if scaled else None,
        )
        self.log = StepLog(self.guard)
        self.iteration = 0

    def step(self, gradient: float = 1.0, images: tuple[str, ...] = (), **losses: float) -> None:
        self.iteration += 1
        self.guard.begin()
        self.guard.backward(self.net(torch.full((1, 1), gradient)).sum())
        named = {name: torch.tensor(value) for name, value in losses.items()}
        self.guard.step(self.iteration, named, images)


def test_terms_values_and_images_are_named_once(messages: list[str]) -> None:
    run = Run()
    run.step(l_pix=1.0, l_cl=2.0, images=("fine.png",))
    run.step(l_pix=1.0, l_cl=math.nan, images=("a.png", "b.png"))
    run.step(l_pix=-math.inf, l_cl=math.inf, images=("c.png",))
    run.step(l_pix=1.0, images=("also_fine.png",))
    run.step(l_pix=math.nan)
    assert messages == []
    assert run.log.read() == []
    assert messages == [
        "WARNING Update skipped, 1 so far: not finite in iteration 2: l_cl: nan; images: a.png, b.png",
        "WARNING Update skipped, 2 so far: not finite in iteration 3: l_pix: -inf, l_cl: inf; images: c.png",
        "WARNING Update skipped, 3 so far: not finite in iteration 5: l_pix: nan",
    ]
    run.step(l_pix=1.0)
    assert run.log.read() == [] and len(messages) == 3


def test_gradients_are_named_where_only_they_are_at_fault(messages: list[str]) -> None:
    run = Run()
    run.step(l_pix=1.0, gradient=math.inf, images=("a.png",))
    run.step(l_pix=math.nan, gradient=math.nan, images=("b.png",))
    run.log.read()
    assert messages == [
        "WARNING Update skipped, 1 so far: not finite in iteration 1: grad_norm: inf; images: a.png",
        "WARNING Update skipped, 2 so far: not finite in iteration 2: l_pix: nan; images: b.png",
    ]


def test_an_overflow_of_scaled_gradients_is_no_warning(messages: list[str]) -> None:
    run = Run(scaled=True)
    run.step(l_pix=1.0, gradient=math.inf, images=("a.png",))
    run.step(l_pix=math.nan, images=("b.png",))
    run.log.read()
    assert [line.split(",")[0] for line in messages] == ["INFO Update skipped", "WARNING Update skipped"]
    assert "the loss scale is halved; iteration 1: grad_norm: inf; images: a.png" in messages[0]


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("fused", [False, True])
def test_the_reason_to_stop_names_the_steps_whenever_they_were_read(fused: bool, every: int) -> None:
    run = Run(limit=4, fused=fused)
    reasons = []
    for iteration in range(1, 12):
        run.step(l_pix=math.nan if iteration != 3 else 1.0, images=(f"{iteration}.png",))
        if not fused:
            assert run.guard.full() is (iteration >= 7)
        if iteration % every == 0:
            reasons.append(run.log.read())
    reasons.append(run.log.read())
    assert [reason for reason in reasons if reason][0] == [
        "iterations 4 to 7 were not finite; their updates were skipped",
        *(f"iteration {n}: l_pix: nan; images: {n}.png" for n in (4, 5, 6, 7)),
    ]


def test_long_runs_of_bad_steps_are_not_all_listed() -> None:
    run = Run(limit=30)
    for _ in range(30):
        run.step(l_pix=math.nan)
    first, *rest = run.log.read()
    assert first.startswith("iterations 1 to 30 were")
    assert [line.split(":")[0] for line in rest] == [f"iteration {n}" for n in range(21, 31)]


def test_it_asks_to_be_read_before_it_forgets(messages: list[str]) -> None:
    run = Run()
    run.step(l_pix=math.nan)
    while not run.guard.full():
        run.step(l_pix=1.0)
    assert run.iteration == CAPACITY
    run.log.read()
    assert len(messages) == 1 and not run.guard.full()
