"""Gaussian noise: its size, its independence, and what clipping does to it."""

from __future__ import annotations

import numpy as np
import pytest

from kdsr.prepare.synthetic_noise import Noise, add_gaussian_noise
from kdsr.runtime.errors import OptionError

SHAPE = (96, 96, 3)
GREY = np.full(SHAPE, 128, np.uint8)


@pytest.mark.parametrize("sigma", [5.0, 25.0])
def test_standard_deviation_and_mean(sigma: float) -> None:
    noise = add_gaussian_noise(GREY, sigma, np.random.default_rng(0)).astype(float) - 128
    number = noise.size
    # rounding adds 1/12; four standard errors, sigma / sqrt(2n) and sigma / sqrt(n)
    assert noise.std() == pytest.approx(np.hypot(sigma, 12**-0.5), abs=4 * sigma / np.sqrt(2 * number))
    assert noise.mean() == pytest.approx(0, abs=4 * sigma / np.sqrt(number))


def test_noise_is_white_and_independent_between_channels() -> None:
    noise = add_gaussian_noise(GREY, 25, np.random.default_rng(0)).astype(float) - 128
    pairs = [
        (noise[..., 0], noise[..., 1]),
        (noise[..., 1], noise[..., 2]),
        (noise[1:], noise[:-1]),
        (noise[:, 1:], noise[:, :-1]),
    ]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(one.size)


def test_clipping_takes_half_of_the_noise_on_black() -> None:
    noisy = add_gaussian_noise(np.zeros(SHAPE, np.uint8), 25, np.random.default_rng(0))
    assert (noisy == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert noisy.mean() == pytest.approx(25 / np.sqrt(2 * np.pi), rel=0.02)


def test_sigma_is_drawn_from_its_range() -> None:
    generator = np.random.default_rng(0)
    drawn = [Noise((10, 50))(GREY[:2, :2], generator, "")[1]["sigma"] for _ in range(100)]
    assert 10 <= min(drawn) < 14 and 46 < max(drawn) <= 50
    assert Noise()(GREY[:2, :2], generator, "")[1] == {"sigma": 25.0}


def test_no_noise_changes_nothing() -> None:
    np.testing.assert_array_equal(Noise((0, 0))(GREY, np.random.default_rng(0), "")[0], GREY)


@pytest.mark.parametrize("sigma", [(-1, 5), (30, 20), (0, 300)])
def test_invalid_sigma(sigma: tuple[float, float]) -> None:
    with pytest.raises(OptionError, match="sigma"):
        Noise(sigma)
