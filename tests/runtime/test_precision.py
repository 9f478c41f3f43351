"""Options of precision, the precision of single networks, and the loss scale of fp16."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from kdsr.runtime.errors import OptionError
from kdsr.runtime.precision import LossScale, Precision, dtypes_of, is_fast, slow_problems

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def test_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(OptionError, match=r"precision\.amp: 'fp8' is neither auto nor bf16 nor fp16"):
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
    assert problem is not None and problem.startswith("precision: fp16: the cpu cannot compute this network")
    assert problem.endswith("use bf16, or leave it out for full precision")
    assert precision.problem(RuntimeError("another")) is None


# ------------------------------------------------------------------------------------------- precision by network


def test_parts_follow_amp_unless_they_have_a_precision_of_their_own() -> None:
    bf16, fp16 = torch.bfloat16, torch.float16
    options = {"amp": "bf16", "student": "float32", "extractor": "fp16"}
    found = dtypes_of(options, on_cpu=True)
    assert found == {"student": None, "teacher": bf16, "extractor": fp16, "history": bf16}
    assert set(dtypes_of(None, on_cpu=True).values()) == {None}
    auto = bf16 if is_fast(bf16, on_cpu=True) else None
    assert set(dtypes_of({"amp": "auto"}, on_cpu=True).values()) == {auto}


class Blocks(nn.Module):
    """A convolution, normalisations, and a linear layer that is no plain ``nn.Linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.layer_norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.norm(self.convolution(x))).flatten(2).transpose(1, 2)
        x = x + self.linear(self.layer_norm(x))
        return self.attention(x, x, x, need_weights=False)[0]


def frozen() -> Blocks:
    torch.manual_seed(0)
    return Blocks().eval().requires_grad_(False)


@pytest.mark.parametrize("outer", [False, True])
def test_a_cast_network_gives_the_bits_of_autocast(outer: bool) -> None:
    x, plain = torch.rand(2, 3, 8, 8), frozen()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x)
    precision = Precision({"teacher": "bf16", "student": "bf16" if outer else "float32"}, CPU)
    net = frozen()
    precision.fix(net, "teacher", cast=True)
    with precision.autocast:
        assert torch.equal(net(x), expected)
    assert net.convolution.weight.dtype == net.linear.weight.dtype == torch.bfloat16
    assert net.norm.weight.dtype == net.layer_norm.weight.dtype == torch.float32
    assert net.attention.out_proj.weight.dtype == torch.float32
    copied = frozen()
    precision.fix(copied, "teacher", cast=False)
    assert torch.equal(copied(x), expected) and copied.convolution.weight.dtype == torch.float32


def test_a_network_in_full_precision_within_a_step_that_is_not() -> None:
    precision = Precision({"amp": "bf16", "extractor": "float32"}, CPU)
    net, x = frozen(), torch.rand(2, 3, 8, 8)
    expected = net(x)
    precision.fix(net, "extractor", cast=True)
    with precision.autocast:
        assert torch.equal(net(x), expected)


def test_a_network_that_a_dtype_does_not_suit_stays_in_full_precision() -> None:
    precision = Precision({"amp": "bf16"}, CPU)
    net, x = frozen(), torch.rand(2, 3, 8, 8)
    expected = net(x)
    net.not_in = frozenset({torch.bfloat16})
    precision.fix(net, "teacher", cast=True)
    with precision.autocast:
        assert torch.equal(net(x), expected)


def test_without_options_networks_are_left_alone() -> None:
    net = frozen()
    before = copy.copy(vars(net))
    Precision(None, CPU).fix(net, "teacher", cast=True)
    assert vars(net) == before


def test_a_gradient_passes_through_a_cast_extractor() -> None:
    gradients = []
    for options in ({}, {"extractor": "bf16"}):
        net, x = frozen(), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        Precision(options, CPU).fix(net, "extractor", cast=True)
        net(x).float().square().mean().backward()
        gradients.append(x.grad)
    assert gradients[0].dtype == gradients[1].dtype == torch.float32
    assert not torch.equal(*gradients)
    torch.testing.assert_close(*gradients, rtol=0.1, atol=0.02 * gradients[0].abs().max().item())


def test_the_loss_is_scaled_for_gradients_through_fp16() -> None:
    scaled = {
        part: Precision({part: "fp16"}, CPU).loss_scale() is not None
        for part in ("student", "extractor", "teacher")
    }
    assert scaled == {"student": True, "extractor": True, "teacher": False}


SLOW = """
import kdsr
from kdsr.runtime.precision import dtypes_of, slow_problems
print(slow_problems({"amp": "bf16", "student": "float32", "history": "fp16"}, on_cpu=True))
print(dtypes_of({"amp": "auto"}, on_cpu=True)["teacher"])
"""


def test_emulation_is_refused_by_name() -> None:
    """On a processor with AVX2 alone, as oneDNN sees it."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", SLOW], env=environment, capture_output=True, text=True, check=True
    )
    problems, auto = done.stdout.splitlines()
    assert problems.startswith(
        "['precision.amp: bf16 needs a processor with AVX512-BF16 or AMX; this one emulates it, and a convolution "
        "takes up to 90 times as long as in float32; remove it, or set auto (precision.allow_slow"
    )
    assert "'precision.history: fp16 needs a processor with AVX512-FP16" in problems
    assert "student" not in problems
    assert auto == "None"


def test_emulation_where_it_is_asked_for_and_on_a_gpu() -> None:
    assert slow_problems({"amp": "fp16", "allow_slow": True}, on_cpu=True) == []
    assert slow_problems({"amp": "fp16"}, on_cpu=False) == []
    assert slow_problems({"amp": None, "teacher": ["bf16"]}, on_cpu=True) == []


# ----------------------------------------------------------------------------------------------- fp16's loss scale


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
