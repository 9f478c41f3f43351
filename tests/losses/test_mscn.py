from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from kdsr.losses.mscn import (
    LONGEST_MATRIX_CPU,
    _by_matrices,
    _by_shifts,
    _convolves,
    _window,
    contrast_constant,
    interleaved,
    mscn,
    row_sums,
)

SIZES = [(1, 1), (1, 6), (3, 2), (4, 9), (8, 5)]
# the last one is done by shifts
ALL_SIZES = [*SIZES, (2, LONGEST_MATRIX_CPU + 1)]


def by_shifts(x: torch.Tensor, adjoint: bool = False) -> torch.Tensor:
    return _by_shifts(_by_shifts(x, 2, adjoint), 3, adjoint)


def plain_mscn(x: torch.Tensor, c: float) -> torch.Tensor:
    """The same by a convolution with the 7x7 window."""
    axis = torch.exp(-0.5 * (torch.arange(-3, 4, dtype=x.dtype) / (7 / 6)) ** 2)
    window = torch.outer(axis, axis) / axis.sum() ** 2

    def blurred(maps):
        padded = F.pad(maps, (3, 3, 3, 3), mode="replicate")
        return F.conv2d(padded.flatten(0, 1)[:, None], window[None, None]).view_as(maps)

    mean = blurred(x)
    return (x - mean) / ((blurred(x * x) - mean**2).clamp_min(0).sqrt() + c)


@pytest.mark.parametrize("size", ALL_SIZES)
def test_value_and_gradient_are_those_of_the_plain_formula(size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours, plain = mscn(x, 0.1), plain_mscn(x, 0.1)
    torch.testing.assert_close(ours, plain, atol=1e-7, rtol=1e-7)
    assert gradcheck(lambda maps: mscn(maps, 0.1), x)


@pytest.mark.parametrize("size", ALL_SIZES)
def test_transposed_window(size):
    torch.manual_seed(0)
    x, y = (torch.randn(1, 2, *size, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close((_window(x) * y).sum(), (x * _window(y, adjoint=True)).sum())
    torch.testing.assert_close(_window(torch.ones_like(x)), torch.ones_like(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("adjoint", [False, True])
def test_matrices_are_the_same_window(size, adjoint, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    like = x.contiguous(memory_format=layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(_by_matrices(like, adjoint), by_shifts(x, adjoint))
        narrow = _by_matrices(like.float(), adjoint)
    torch.testing.assert_close(narrow, by_shifts(x.float(), adjoint))


LONG = [(LONGEST_MATRIX_CPU + 1, 20), (3, 18), (1, 40), (40, 2)]


mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@mkldnn
@pytest.mark.parametrize("size", LONG)
@pytest.mark.parametrize("adjoint", [False, True])
def test_convolutions_are_the_same_window(size, adjoint):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size).contiguous(memory_format=torch.channels_last)
    assert _convolves(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _window(x, adjoint=adjoint)
    torch.testing.assert_close(found, by_shifts(x.contiguous(), adjoint))
    assert interleaved(found)


@mkldnn
def test_convolutions_are_not_used_if_inexact_or_slow(monkeypatch):
    x = torch.randn(1, 5, 20, 20)
    by_channel = x.contiguous(memory_format=torch.channels_last)
    assert _convolves(by_channel)
    assert not _convolves(x)
    assert not _convolves(by_channel.double())
    with monkeypatch.context() as without:
        without.setattr(torch.backends, "mkldnn", SimpleNamespace(is_available=lambda: True, enabled=False))
        assert not _convolves(by_channel)
    monkeypatch.setattr(torch.backends.mkldnn, "conv", SimpleNamespace(fp32_precision="bf16"))
    assert not _convolves(by_channel)


@pytest.mark.parametrize("size", LONG)
def test_interleaved_maps_have_the_same_coefficients(size):
    torch.manual_seed(0)
    plain = torch.randn(2, 5, *size).requires_grad_()
    by_channel = plain.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(2, 5, *size)
    found = []
    for x in (plain, by_channel):
        y = mscn(x, 0.1)
        found.append((y, *torch.autograd.grad((y * weights).sum(), x)))
    assert interleaved(found[1][0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_sums_of_rows():
    x = torch.arange(12.0).view(1, 2, 2, 3)
    assert row_sums(x).tolist() == [[[3, 21], [12, 30]]]
    assert row_sums(x.contiguous(memory_format=torch.channels_last)).tolist() == [[[3, 21], [12, 30]]]


def test_an_offset_changes_nothing_in_float32():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 16, 16)
    torch.testing.assert_close(mscn(x + 1000, 0.1), mscn(x, 0.1), atol=2e-3, rtol=0)


def test_constant_is_the_range_over_255():
    features = torch.tensor([[-1.0, 4.1], [0.0, 2.0]], requires_grad=True).view(1, 2, 1, 2)
    c = contrast_constant(features)
    assert c.item() == pytest.approx(0.02)
    assert not c.requires_grad
    assert contrast_constant(torch.full((1, 2, 3, 3), 5.0)).item() == 1
    assert contrast_constant(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)).dtype == torch.float32


def test_scaling_features_and_constant_together_changes_nothing():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(
        mscn(1000 * x, contrast_constant(1000 * x)), mscn(x, contrast_constant(x)), atol=1e-9, rtol=1e-9
    )
