"""Winograd's convolution against the direct one, where it is used, and images side by side on threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from kdsr.runtime.cpu_threads import by_image
from kdsr.runtime.precision import Precision
from kdsr.runtime.winograd import Winograd, convolve, transformed

CPU = torch.device("cpu")


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [(24, 24), (25, 31), (1, 1), (6, 170), (48, 47)])
@pytest.mark.parametrize(("inputs", "outputs", "images"), [(3, 5, 2), (7, 2, 1), (16, 16, 3)])
def test_it_is_the_direct_convolution(size: tuple[int, int], inputs: int, outputs: int, images: int) -> None:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1).double()
    x = torch.randn(images, inputs, *size, dtype=torch.float64)
    expected = convolution(x).detach()
    weight, bias = transformed(convolution.weight.detach()), convolution.bias.detach()
    found = convolve(x.float(), weight.float(), bias.float())
    assert found.shape == expected.shape
    assert _distance(found, expected) < 5e-6


def test_gradients_of_the_input_are_those_of_the_direct_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(96, 100, 3, padding=1), nn.SiLU()).requires_grad_(False)
    x = torch.randn(2, 96, 26, 30, requires_grad=True)
    weight = torch.randn(2, 100, 26, 30)
    exact = net.double()(x.double())
    (expected,) = torch.autograd.grad((exact * weight).sum(), x)
    Precision(None, CPU).fix(net.float(), "extractor", cast=True)
    assert isinstance(net[0].forward, Winograd)
    (found,) = torch.autograd.grad((net(x) * weight).sum(), x)
    assert _distance(found, expected) < 5e-6


def test_only_frozen_wide_convolutions_in_float32_use_it() -> None:
    def net() -> nn.Module:
        odd = [
            nn.Conv2d(128, 128, 3, padding=1, stride=2),
            nn.Conv2d(128, 128, 1),
            nn.Conv2d(128, 128, 3),
            nn.Conv2d(128, 128, 3, padding=2, dilation=2),
            nn.Conv2d(128, 128, 3, padding=1, groups=2),
            nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.Conv2d(128, 512, 3, padding=1),
        ]
        return nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), *odd)

    def used(part: str, opt: dict[str, object] | None = None, frozen: bool = True) -> list[bool]:
        built = net().requires_grad_(not frozen)
        Precision(opt, CPU).fix(built, part, cast=part != "history")
        return [isinstance(module.forward, Winograd) for module in built]

    only_the_first, none = [True] + 8 * [False], 9 * [False]
    assert used("extractor") == used("teacher") == only_the_first
    assert used("extractor", frozen=False) == none
    assert used("history") == none  # its weights change
    assert used("teacher", {"winograd": False}) == none
    assert used("teacher", {"amp": "bf16", "allow_slow": True}) == none


def test_small_images_and_other_precisions_go_through_the_convolution_itself() -> None:
    convolution = nn.Conv2d(96, 96, 3, padding=1).requires_grad_(False)
    winograd = Winograd(convolution)
    for x in (torch.randn(1, 96, 23, 40), torch.randn(96, 30, 30)):
        torch.testing.assert_close(winograd(x), convolution(x), rtol=0, atol=0)


def test_images_of_a_batch_run_on_a_thread_each() -> None:
    seen: set[int] = set()
    both = threading.Barrier(2)

    def forward(x: Tensor, factor: float) -> list[Tensor]:
        both.wait(60)
        seen.add(threading.get_ident())
        assert not torch.is_grad_enabled()
        return [x * factor, x[:, :1].sum((2, 3))]

    images = torch.rand(5, 3, 8, 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            found = by_image(forward)(images, 2.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 2 and threading.get_ident() not in seen
    for output, expected in zip(found, (images * 2.0, images[:, :1].sum((2, 3))), strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_an_error_on_a_thread_reaches_the_caller() -> None:
    def forward(x: Tensor) -> Tensor:
        raise ValueError(f"{len(x)} images")

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad(), pytest.raises(ValueError, match="1 images"):
            by_image(forward)(torch.rand(2, 3, 8, 8))
    finally:
        torch.set_num_threads(threads)


def test_a_tapped_teacher_sees_its_batch_in_one_pass() -> None:
    seen: list[int] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for tapped in (False, True):
            net = nn.Sequential(nn.Conv2d(3, 3, 1))
            if tapped:
                net[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
            Precision(None, CPU).fix(net, "teacher", cast=True)
            if not tapped:
                net[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
            with torch.no_grad():
                net(torch.rand(2, 3, 4, 4))
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 1, 2]
