"""Weights of losses that change during a run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from basicsr.losses import build_loss

from kdsr.distill.weight_schedule import ScheduledLoss, weight_at
from kdsr.models.kd_model import KDModel
from kdsr.options.check import check

Options = dict[str, Any]


def test_steps_by_hand():
    points = [(0, 0.0), (5, 2.0), (8, 1.0)]
    weights = [weight_at(points, False, iteration) for iteration in (1, 4, 5, 7, 8, 100)]
    assert weights == [0, 0, 2, 2, 1, 1]


def test_ramps_by_hand():
    points = [(2, 1.0), (6, 3.0), (8, 0.0)]
    weights = [weight_at(points, True, iteration) for iteration in (1, 2, 3, 6, 7, 8, 100)]
    assert weights == [1, 1, 1.5, 3, 1.5, 0, 0]


def test_a_loss_with_further_results_keeps_them():
    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x.sum(), "seen"

    loss = ScheduledLoss(Both(), [[0, 0.0], [3, 0.5]])
    loss.begin(3)
    value, message = loss(torch.ones(4))
    assert (value.item(), message) == (2, "seen")


def trained(options: Options, weight: Any, steps: int) -> tuple[KDModel, list[float]]:
    options = copy.deepcopy(options)
    options["train"]["pixel_opt"]["loss_weight"] = weight
    options["train"]["ema_decay"] = 0
    options.update(num_gpu=0, dist=False, rank=0, world_size=1, is_train=True)
    torch.manual_seed(0)
    model = KDModel(options)
    logged = []
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        model.feed_data({"lq": torch.rand(1, 3, 8, 8), "gt": torch.rand(1, 3, 32, 32)})
        model.optimize_parameters(step)
        logged.append(model.get_current_log()["l_pix"])
    return model, logged


def test_a_run_follows_the_schedule(run_options: Options):
    model, logged = trained(run_options, [[0, 0.0], [3, 0.5]], 3)
    assert logged[:2] == [0, 0]
    plain = build_loss({"type": "L1Loss", "loss_weight": 0.5, "reduction": "mean"})
    assert logged[2] == pytest.approx(plain(model.output, model.gt).item())
    # at weight 0 all of the student is used, as DDP wants it, and nothing moves
    still, _ = trained(run_options, [[0, 0.0], [3, 0.5]], 2)
    untouched, _ = trained(run_options, 1.0, 0)
    for ours, theirs in zip(still.net_g.parameters(), untouched.net_g.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.grad is not None


def test_a_constant_schedule_is_the_number(run_options: Options):
    _, scheduled = trained(run_options, [[0, 0.5]], 3)
    _, plain = trained(run_options, 0.5, 3)
    assert scheduled == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([], "is no schedule; write steps [[0, 0.0], [5000, 0.1]]"),
        ([[0, 1.0], [5]], "is no schedule"),
        ([[0, 1.0], [5, "x"]], "is no schedule"),
        ([[0.5, 1.0]], "is no schedule"),
        ([[0, float("nan")]], "is no schedule"),
        ({"rampe": [[0, 1.0]]}, "is no schedule"),
        ({"ramp": 3}, "is no schedule"),
        ([[5, 1.0], [5, 2.0]], "the iterations [5, 5] must grow from point to point"),
    ],
)
def test_what_is_no_schedule_is_refused_by_its_place(run_options: Options, weight: Any, message: str):
    run_options["train"]["pixel_opt"]["loss_weight"] = weight
    problems = check(run_options, is_train=True)
    assert len(problems) == 1
    assert problems[0].startswith("train.pixel_opt.loss_weight: ") and message in problems[0]


def test_schedules_are_taken(run_options: Options):
    for weight in ([[0, 0.0], [5000, 0.1]], {"ramp": [[0, 0], [5000, 1]]}):
        run_options["train"]["pixel_opt"]["loss_weight"] = weight
        assert check(run_options, is_train=True) == []
