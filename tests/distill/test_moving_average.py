"""The student's moving average: its warm-up, and the warning when it cannot follow in so few iterations."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.distill.moving_average import WORTH_A_WARNING, ema_decay_at, fitting_decay, lag_warning
from kdsr.models.kd_model import KDModel
from kdsr.options.check import check
from small_runs import complete, run

Options = dict[str, Any]
decays = st.floats(0, 1, exclude_min=True, exclude_max=True)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(decays, st.integers(1, 300_000))
def test_the_warning_comes_when_initial_weights_are_left_and_its_advice_ends_it(
    decay: float, total: int
) -> None:
    train = {"ema_decay": decay, "total_iter": total}
    warning = lag_warning(train, has_warmup=True)
    assert (warning is not None) == (decay**total > WORTH_A_WARNING * (1 + 1e-9))
    fitting = fitting_decay(total)
    assert lag_warning({**train, "ema_decay": fitting}, has_warmup=True) is None
    assert 0 < fitting < 1 and (1 - 2 * (1 - fitting)) ** total < WORTH_A_WARNING / 10 or total < 10
    if warning is not None:
        assert f"set {fitting} or lower, or train.ema_warmup: true" in warning
        assert lag_warning({**train, "ema_warmup": True}, has_warmup=True) is None


@settings(deadline=None, derandomize=True, max_examples=60)
@given(decays, st.integers(5, 3000))
def test_a_warm_up_leaves_little_of_the_initial_weights(decay: float, total: int) -> None:
    kept = [ema_decay_at(iteration, decay, True) for iteration in range(1, total + 1)]
    assert kept == sorted(kept) and kept[-1] <= decay and math.prod(kept) < WORTH_A_WARNING
    assert [ema_decay_at(iteration, decay, False) for iteration in (1, total)] == [decay, decay]


@pytest.mark.parametrize("value", [None, 0, "much"])
def test_without_an_average_there_is_nothing_to_say(value: Any) -> None:
    assert lag_warning({"ema_decay": value, "total_iter": 3}, has_warmup=True) is None
    assert lag_warning({"ema_decay": 0.999, "total_iter": value}, has_warmup=True) is None
    assert lag_warning({}, has_warmup=True) is None


def test_the_warning_comes_before_the_run(
    run_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_options["train"]["ema_decay"] = 0.999
    assert run(run_options) == 0
    message = "train.ema_decay: 0.999 is slow for 3 iterations: 99.7 % of the initial weights"
    assert f"Warning: {message}" in capsys.readouterr().err
    assert f"WARNING: {message}" in next(Path("experiments/run").glob("*.log")).read_text(encoding="utf-8")
    run_options["train"]["ema_warmup"] = True
    assert run(run_options) == 0
    assert "is slow for" not in capsys.readouterr().err


def test_basicsrs_own_models_are_warned_and_offered_no_option_that_they_lack(run_options: Options) -> None:
    run_options["model_type"] = "SRModel"
    warnings: list[str] = []
    assert check(run_options, True, warnings) == []
    (warning,) = warnings
    assert warning.startswith("train.ema_decay: 0.9 is slow for 3 iterations") and "ema_warmup" not in warning
    run_options["train"]["ema_warmup"] = True
    assert [problem for problem in check(run_options, True) if "train.ema_warmup" in problem]


def test_a_warm_up_of_nothing_is_refused(run_options: Options) -> None:
    run_options["train"].update(ema_warmup=True, ema_decay=0)
    (problem,) = check(run_options, True)
    assert problem.startswith("train.ema_warmup: needs train.ema_decay above 0")


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_that_of_a_plain_loop(run_options: Options, warmup: bool) -> None:
    run_options["train"].update(ema_decay=0.3, ema_warmup=warmup)
    torch.manual_seed(0)
    model = KDModel(complete(run_options))
    plain = copy.deepcopy(model.net_g_ema)
    for iteration in range(1, 8):
        generator = torch.Generator().manual_seed(iteration)
        lq, gt = torch.rand(2, 3, 8, 8, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
        model.feed_data({"lq": lq, "gt": gt})
        model.optimize_parameters(iteration)
        decay = min(0.3, (1 + iteration) / (10 + iteration)) if warmup else 0.3  # below 0.3 up to the second
        for average, weight in zip(plain.parameters(), model.net_g.parameters(), strict=True):
            average.data.mul_(decay).add_(weight.detach(), alpha=1 - decay)
    for ours, expected in zip(model.net_g_ema.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_a_resumed_run_has_the_same_average(
    run_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_options["train"].update(ema_decay=0.999, ema_warmup=True, total_iter=4)
    run_options["logger"]["save_checkpoint_freq"] = 2
    assert run(run_options) == 0
    whole = torch.load("experiments/run/models/net_g_4.pth", weights_only=True)["params_ema"]
    run_options["train"]["total_iter"] = 2
    assert run(run_options) == 0
    run_options["train"]["total_iter"] = 4
    assert run(run_options, "--auto_resume") == 0
    resumed = torch.load("experiments/run/models/net_g_4.pth", weights_only=True)["params_ema"]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
