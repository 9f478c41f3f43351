"""Features by name: any network's, as maps, also where the network overwrites them; and the student's adapters."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from basicsr.archs import build_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdsr.distill.adapters import TapGroup, TapPair, resized_like
from kdsr.distill.bundle import StudentBundle
from kdsr.distill.step import Teacher
from kdsr.distill.tap_options import tap_pairs, tap_problems
from kdsr.distill.taps import FeatureTaps, module_names, shapes_of
from kdsr.runtime.errors import OptionError


class Small(nn.Module):
    """Two levels; the first one's output is overwritten twice after it was made."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.out = nn.Conv2d(channels, 3, 1)
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        features = self.relu(features)
        features += 1
        self.pool(self.down(features))
        self.head(features.mean((2, 3)))
        return self.out(features)


def test_features_are_what_the_modules_gave() -> None:
    net, x = Small(), torch.rand(2, 3, 8, 12)
    taps = FeatureTaps(net, ["down", "conv"], "train.taps")
    assert shapes_of(net, taps, x) == [(2, 8, 4, 6), (2, 4, 8, 12)]
    output = net(x)
    down, conv = taps.take(x)
    torch.testing.assert_close(conv, net.conv(x))  # neither the ReLU nor the += 1 has changed it
    torch.testing.assert_close(output, net.out(conv.relu() + 1))
    conv.sum().backward()
    assert net.conv.weight.grad is not None and net.out.weight.grad is None
    with pytest.raises(OptionError, match="conv was not called|down was not called"):
        taps.take(x)  # taken once


def test_what_a_network_adds_to_is_copied() -> None:
    net = build_network(
        {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": 2}
    )
    x = torch.rand(1, 3, 6, 6)
    taps = FeatureTaps(net, ["body", "conv_after_body"], "train.taps")
    shapes_of(net, taps, x)
    net(x)
    body, after = taps.take(x)
    torch.testing.assert_close(
        after, net.conv_after_body(body)
    )  # not yet the long skip, which EDSR adds in place


def test_tokens_become_maps() -> None:
    net = build_network(
        {"type": "SwinIR", "upscale": 2, "img_size": 16, "window_size": 8, "depths": [2], "embed_dim": 12,
         "num_heads": [2], "mlp_ratio": 2, "upsampler": "pixelshuffledirect"}
    )  # fmt: skip
    x = torch.rand(2, 3, 16, 24)
    taps = FeatureTaps(net, ["layers.0", "conv_after_body"], "train.taps")
    assert shapes_of(net, taps, x) == [(2, 12, 16, 24), (2, 12, 16, 24)]


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(OptionError) as caught:
        FeatureTaps(Small(), ["cnov", "down"], "train.taps.student")
    assert str(caught.value) == "train.taps.student: Small has no module 'cnov'; did you mean conv?"


def test_what_is_no_feature_map() -> None:
    net, x = Small(), torch.rand(1, 3, 8, 8)
    with pytest.raises(OptionError, match=r"head gives \(1, 3\), which is no feature map"):
        shapes_of(net, FeatureTaps(net, ["head"], "train.taps"), x)


# ------------------------------------------------------------------------------------------------------- adapters


def bundle(student_tap: str, teacher_tap: str) -> StudentBundle:
    group = TapGroup("train.taps", [TapPair(student_tap, teacher_tap)])
    teachers = {"t": Teacher(Small(6).requires_grad_(False), multiple_of=1, scale=1)}
    return StudentBundle(Small(4), {"facd": group}, teachers, torch.rand(1, 3, 8, 8))


def test_features_are_adapted_to_the_teachers_channels() -> None:
    bundled, x = bundle("conv", "conv"), torch.rand(2, 3, 8, 8)
    output, features, _ = bundled(x)
    (adapted,) = features["facd"]
    assert adapted.shape == (2, 6, 8, 8)
    student, adapter = bundled.student, bundled.adapters["facd"][0]  # type: ignore[index]
    torch.testing.assert_close(adapted, adapter(student.conv(x)))
    torch.testing.assert_close(output, student(x))
    adapted.sum().backward()
    assert adapter.weight.grad is not None and student.conv.weight.grad is not None
    assert {name for name, _ in bundled.named_parameters()} == {
        *(f"student.{name}" for name, _ in student.named_parameters()),
        "adapters.facd.0.weight",
        "adapters.facd.0.bias",
    }  # no teacher in it


def test_features_of_half_the_size_are_enlarged() -> None:
    bundled, x = bundle("down", "conv"), torch.rand(2, 3, 8, 8)
    (enlarged,) = resized_like(bundled(x).features["facd"], [torch.zeros(2, 6, 8, 8)])
    assert enlarged.shape == (2, 6, 8, 8)


def test_sizes_that_no_adapter_bridges() -> None:
    with pytest.raises(
        OptionError, match="the student's pool is 1x1, the teacher's conv 8x8; no adapter bridges"
    ):
        bundle("pool", "conv")


# -------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "train.taps: [] is not a list of features"),
        (["body.3"], "train.taps.0: 'body.3' is not a list of features; give pairs"),
        ([{"student": "a"}], "train.taps.0: {'student': 'a'} is not a list of features"),
        ({"student": ["a"]}, "train.taps: expected two lists of module names, student and teacher"),
        (
            {"student": ["a", "b"], "teacher": ["c"]},
            "train.taps: 2 modules of the student and 1 of the teacher",
        ),
        (
            {"student": ["a"], "teacher": [3]},
            "train.taps: {'student': ['a'], 'teacher': [3]} is not a list of features",
        ),
    ],
)
def test_options_that_name_no_pairs(value: object, problem: str) -> None:
    (found,) = tap_problems(value, "train.taps")
    assert found.startswith(problem)


@pytest.mark.parametrize("value", [[{"student": "a", "teacher": "b"}], {"student": ["a"], "teacher": ["b"]}])
def test_both_ways_to_write_pairs(value: object) -> None:
    assert tap_problems(value, "train.taps") == []
    assert tap_pairs(value) == [TapPair("a", "b")]


def deep(depth: int) -> nn.Module:
    """``body`` is a list of so many modules, each with a list of two of its own."""
    blocks = (nn.ModuleDict({"layers": nn.ModuleList([nn.ReLU(), nn.ReLU()])}) for _ in range(depth))
    return nn.ModuleDict({"body": nn.Sequential(*blocks), "tail": nn.ReLU()})


shares = st.integers(1, 40).flatmap(lambda whole: st.tuples(st.integers(1, whole), st.just(whole)))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 40), shares)
def test_a_share_of_a_list_is_a_module_at_any_depth(depth: int, share: tuple[int, int]) -> None:
    part, whole = share
    names = [
        f"body.{part}/{whole}",
        "body.1/1",
        f"body.{part}/{whole}.layers.1/2",
        "tail",
        f"body.{depth - 1}",
    ]
    found = module_names(deep(depth), names, "train.taps")
    index = int(found[0].removeprefix("body."))
    assert index + 1 == max(1, int(Fraction(part, whole) * depth))  # so many of the modules have run
    assert found[1:] == [f"body.{depth - 1}", f"body.{index}.layers.0", "tail", f"body.{depth - 1}"]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 40))
def test_with_as_many_modules_as_it_counts_a_share_is_that_module(depth: int) -> None:
    names = [f"body.{number}/{depth}" for number in range(1, depth + 1)]
    assert module_names(deep(depth), names, "train.taps") == [f"body.{index}" for index in range(depth)]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 400))
def test_a_number_beyond_the_depth_is_answered_with_what_there_is(depth: int, beyond: int) -> None:
    with pytest.raises(OptionError, match=r"there is body\.0 ") as caught:
        module_names(deep(depth), [f"body.{depth + beyond}"], "train.taps.student")
    assert depth == 1 or f"to body.{depth - 1};" in str(caught.value)
