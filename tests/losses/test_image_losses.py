"""The losses on whole images: wavelet, frequency and masked; values by hand, gradients, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from basicsr.losses import build_loss
from torch.autograd import gradcheck

from kdsr.losses.frequency_loss import FFTLoss, frequency_distance
from kdsr.losses.masked_loss import MaskedLoss, teacher_mask
from kdsr.losses.wavelet_loss import WaveletLoss, haar, wavelet_distance
from kdsr.runtime.errors import OptionError


def images(seed: int, *size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_haar_by_hand() -> None:
    low, details = haar(torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]]))
    assert low.flatten().tolist() == [5.5]
    assert details.flatten().tolist() == [-2.5, -1.5, 0.5]  # rows, columns, diagonal


def test_haar_keeps_the_energy_and_extends_by_zeros() -> None:
    image = images(0, 2, 3, 7, 5)
    low, details = haar(image)
    assert low.shape == (2, 3, 4, 3) and details.shape == (2, 3, 3, 4, 3)
    torch.testing.assert_close(low.square().sum() + details.square().sum(), image.square().sum())
    torch.testing.assert_close(low[..., -1, -1], image[..., -1, -1] / 2)  # its three neighbours are zeros


def test_wavelet_value_by_hand() -> None:
    """A difference of 1 everywhere has no details; each level doubles the low-pass band."""
    ones, zeros = torch.ones(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    assert wavelet_distance(ones, zeros).item() == 16
    assert wavelet_distance(ones, zeros, 2).item() == 4
    # one pixel, of 4x4: all four coefficients of the first level are 1/2, of the second 1/4
    dot = torch.zeros(1, 1, 4, 4)
    dot[..., 0, 0] = 1
    expected = 3 * 0.5 / (3 * 4) + 3 * 0.25 / 3 + 0.25
    assert wavelet_distance(dot, 0 * dot, 2).item() == pytest.approx(expected)


def test_wavelet_value_of_pywavelets() -> None:
    """Of sides that 16 does not divide; recorded from PyWavelets (``dwt2(x, "haar", mode="zero")`` four times)."""
    row, column = torch.meshgrid(torch.arange(19), torch.arange(21), indexing="ij")
    image = ((7 * row**2 + 3 * column + 5 * row * column) % 11).double()[None, None] / 10
    loss = build_loss({"type": "WaveletLoss", "loss_weight": 2.0})(image + 0.5, torch.full_like(image, 0.5))
    assert loss.item() == pytest.approx(2 * 5.253783670033672, rel=1e-12)


@pytest.mark.parametrize("norm", ["backward", "ortho"])
def test_frequency_value_by_hand(norm: str) -> None:
    """A constant has one coefficient: the sum of its pixels. A single pixel has a spectrum of absolute value 1."""
    factor = 1 if norm == "backward" else 1 / math.sqrt(6 * 4)
    loss = FFTLoss(loss_weight=0.1, norm=norm)
    ones, dot = torch.ones(1, 1, 6, 4), torch.zeros(1, 1, 6, 4)
    dot[..., 0, 0] = 1
    assert loss(ones, 0 * ones).item() == pytest.approx(0.1 * factor * 24 / (24 * 2), rel=1e-6)
    assert loss(dot, 0 * dot).item() == pytest.approx(0.1 * factor * 24 / (24 * 2), rel=1e-6)
    x, y = images(1, 2, 3, 5, 6), images(2, 2, 3, 5, 6)
    spectra = [torch.fft.fft2(image, norm=norm) for image in (x, y)]
    parts = [torch.stack((spectrum.real, spectrum.imag), -1) for spectrum in spectra]  # as in MIMO-UNet
    torch.testing.assert_close(loss(x, y), 0.1 * (parts[0] - parts[1]).abs().mean())


def test_masked_value_by_hand() -> None:
    gt = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[[[0.0, 0.2]], [[0.0, 0.4]]]])  # errors of 0 and 0.3
    student = teacher + torch.tensor([1.0, 2.0])
    weight = math.exp(-0.3 / 0.05)
    torch.testing.assert_close(teacher_mask(teacher, gt, 0.05), torch.tensor([[[[1.0, weight]]]]))
    loss = build_loss({"type": "MaskedLoss", "loss_weight": 0.5})
    assert loss(student, teacher, gt).item() == pytest.approx(0.5 * (1 + 2 * weight) / 2, rel=1e-6)


def test_a_mask_of_a_perfect_teacher_is_l1() -> None:
    student, teacher = images(3, 2, 3, 8, 8), images(4, 2, 3, 8, 8)
    torch.testing.assert_close(MaskedLoss()(student, teacher, teacher), (student - teacher).abs().mean())


@pytest.mark.parametrize(
    "loss",
    [
        wavelet_distance,
        frequency_distance,
        lambda student, teacher: MaskedLoss()(student, teacher, images(7, 1, 2, 5, 6)),
    ],
    ids=["wavelet", "frequency", "masked"],
)
def test_gradients_are_those_of_the_equations(loss) -> None:
    student, teacher = images(5, 1, 2, 5, 6).requires_grad_(), images(6, 1, 2, 5, 6)
    assert gradcheck(lambda image: loss(image, teacher), student)
    assert loss(teacher, teacher) == 0
    narrow = loss(student.detach().bfloat16(), teacher.bfloat16())
    assert (
        narrow.dtype in (torch.float32, torch.float64) and narrow.isfinite()
    )  # the mask above is of float64


def test_the_mask_moves_neither_teacher_nor_weight() -> None:
    student, teacher = images(8, 1, 3, 4, 4).requires_grad_(), images(9, 1, 3, 4, 4).requires_grad_()
    MaskedLoss()(student, teacher, images(10, 1, 3, 4, 4)).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WaveletLoss(levels=0), "WaveletLoss: levels 0 is below 1"),
        (lambda: FFTLoss(norm="forward"), "FFTLoss: norm 'forward' is unknown; it can be backward or ortho"),
        (lambda: MaskedLoss(error_scale=0), "MaskedLoss: error_scale 0 is not above 0"),
    ],
)
def test_what_means_nothing_is_refused(build, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build()
