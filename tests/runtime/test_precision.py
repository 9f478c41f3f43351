"""Options of precision, and the loss scale of fp16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdsr.runtime.errors import OptionError
from kdsr.runtime.precision import LossScale, Precision

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def test_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(OptionError, match=r"precision\.amp: 'fp8' is neither bf16 nor fp16"):
        Precision({"amp": "fp8"}, CPU)


def test_only_fp16_scales_its_loss() -> None:
    assert [Precision({"amp": amp}, CPU).loss_scale() is None for amp in (None, "bf16", "fp16")] == [
        True,
        True,
        False,
    ]


def test_what_the_device_cannot_compute_in_fp16_names_the_option() -> None:
    precision = Precision({"amp": "fp16"}, CPU)
    with pytest.raises(RuntimeError) as raised, precision.autocast:
        nn.functional.rrelu(torch.ones(2, dtype=torch.float16), training=True)
    problem = precision.problem(raised.value)
    assert problem is not None and problem.startswith(
        "precision.amp: fp16: the cpu cannot compute this network"
    )
    assert problem.endswith("use bf16, or leave it out for full precision")
    assert precision.problem(RuntimeError("another")) is None


def test_scale_doubles_after_enough_good_steps_and_halves_at_once() -> None:
    scale = LossScale(CPU)
    scale.GROWTH_INTERVAL = 3
    factors = []
    for good, overflowed in [(YES, NO)] * 3 + [(NO, YES)] + [(YES, NO)] * 2 + [(NO, NO)] + [(YES, NO)]:
        scale.follow(good, overflowed)
        factors.append(scale.factor.item() / 65536)
    assert factors == [1, 1, 2, 1, 1, 1, 1, 2]
    assert scale.good_steps.item() == 0


def test_scale_stays_a_number_that_can_be_divided_by() -> None:
    scale = LossScale(CPU)
    scale.GROWTH_INTERVAL = 1
    for _ in range(200):
        scale.follow(YES, NO)
    assert scale.factor.item() == 2.0**48
    for _ in range(200):
        scale.follow(NO, YES)
    assert scale.factor.item() == 2.0**-24


def test_unscaling_is_exact() -> None:
    scale = LossScale(CPU)
    gradients = [torch.tensor([1.1, -3e-30, 0.0]), torch.full((2, 2), 7.3)]
    scaled = [gradient * scale.factor for gradient in gradients]
    scale.unscale(scaled)
    assert all(torch.equal(ours, exact) for ours, exact in zip(scaled, gradients, strict=True))


def test_scale_goes_on_from_a_state() -> None:
    scale, other = LossScale(CPU), LossScale(CPU)
    for _ in range(5):
        scale.follow(YES, NO)
    scale.follow(NO, YES)
    scale.follow(YES, NO)
    other.load(scale.state())
    assert (other.factor.item(), other.good_steps.item()) == (32768, 1)
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="loss scale is"):
            other.load({"factor": torch.tensor(factor), "good_steps": torch.tensor(0)})
