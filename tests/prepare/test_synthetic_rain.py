"""Rain: streaks have the direction, size and number that are recorded, and only add light."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
from scipy.ndimage import gaussian_filter

from kdsr.prepare.synthesis import Seeded
from kdsr.prepare.synthetic_rain import Rain, screen, streak_field, streak_kernel
from kdsr.runtime.errors import OptionError

BLACK = np.zeros((120, 160), np.uint8)


def direction(image: np.ndarray) -> float:
    """The angle from the vertical along which an image changes least, by its mean structure tensor."""
    # of Gaussian derivatives: differences of pixels see thin streaks nearer to the axes than they are
    slopes = [gaussian_filter(image.astype(float), 1.5, order=order).ravel() for order in ((1, 0), (0, 1))]
    _, vectors = np.linalg.eigh(np.cov(slopes))
    down, right = vectors[:, 0]
    return float(np.degrees(np.arctan(right / down)))


@pytest.mark.parametrize("angle", [-70, -30, 0, 12, 45, 80])
def test_a_streak_has_its_direction_length_and_width(angle: float) -> None:
    kernel = streak_kernel(angle, 30, 2.5)
    middle = kernel.shape[0] // 2
    assert kernel.shape == (2 * middle + 1,) * 2 and kernel[middle, middle] == kernel.max() == 1
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-6)
    y, x = np.mgrid[-middle : middle + 1, -middle : middle + 1]
    along = x * np.sin(np.radians(angle)) + y * np.cos(np.radians(angle))
    across = x * np.cos(np.radians(angle)) - y * np.sin(np.radians(angle))
    # a line of length 30 whose ends fade has this area: 30 times the area under the Gaussian
    assert kernel.sum() == pytest.approx(30 * 2.5 * np.sqrt(np.pi / np.log(16)), rel=0.01)
    reach = [(kernel * part**2).sum() / kernel.sum() for part in (across, along)]
    assert reach[0] == pytest.approx(2.5**2 / (8 * np.log(2)), rel=0.02)
    assert reach[1] > 50 * reach[0]
    assert max(kernel[0].max(), kernel[-1].max(), kernel[:, 0].max(), kernel[:, -1].max()) < 0.01


@pytest.mark.parametrize("angle", [-60, -25, 0, 10, 40])
def test_direction_of_the_rain_is_the_parameter(angle: float) -> None:
    """Positive: the lower end of a streak is to the right."""
    rain, drawn = Seeded(Rain(angle=(angle, angle), length=(20, 20), veil=(0, 0)))("a", BLACK)
    assert drawn["angle"] == angle
    assert direction(rain) == pytest.approx(angle, abs=3)
    assert all(abs(group["angle"] - angle) <= 2 for group in drawn["layers"])


def test_density_is_the_mean_number_of_streaks_over_a_pixel() -> None:
    kernel = streak_kernel(20, 15, 2)
    fields = [streak_field((90, 110), kernel, 0.3, np.random.default_rng(seed)) for seed in range(20)]
    # streaks of mean brightness 1, whose areas make up 0.3 of the image's
    assert np.mean([field.mean() for field, _ in fields]) == pytest.approx(0.3, rel=0.05)
    padded = (90 + len(kernel) - 1) * (110 + len(kernel) - 1)
    assert np.mean([n for _, n in fields]) == pytest.approx(0.3 * padded / kernel.sum(), rel=0.05)
    # as many at the border as within: streaks reach in from outside
    mean = np.mean([field for field, _ in fields], axis=0)
    assert mean[:5].mean() == pytest.approx(0.3, rel=0.2)


def test_rain_only_adds_light_and_only_where_streaks_are() -> None:
    cat = skimage.data.chelsea()[80:180, 120:240]
    rain, drawn = Seeded(Rain(density=(0.05, 0.05), veil=(0, 0)))("a", cat)
    streaks, _ = Seeded(Rain(density=(0.05, 0.05), veil=(0, 0)))("a", np.zeros_like(cat))
    assert (rain >= cat).all() and drawn["veil"] == 0
    dry = streaks == 0
    assert 0.3 < dry.mean() < 0.95
    np.testing.assert_array_less(rain[dry].astype(int) - cat[dry], 2)  # below half a level, and rounding
    assert (rain[streaks > 40].astype(int) - cat[streaks > 40]).mean() > 10


def test_streaks_are_grey() -> None:
    rain, _ = Seeded(Rain())("a", np.zeros((40, 50, 3), np.uint8))
    assert rain.max() > 0 and (rain == rain[..., :1]).all()


def test_screen() -> None:
    image = np.array([[[0.0, 0.5, 1.0]]], np.float32)
    np.testing.assert_allclose(screen(image, np.array([[0.4]])), [[[0.4, 0.7, 1.0]]], atol=1e-6)
    np.testing.assert_allclose(screen(image, 0.2), [[[0.2, 0.6, 1.0]]], atol=1e-6)


def test_veil_covers_everything() -> None:
    rain, _ = Seeded(Rain(density=(0, 0), veil=(0.2, 0.2)))("a", np.full((4, 5, 3), 51, np.uint8))
    np.testing.assert_array_equal(rain, round(255 * (1 - 0.8 * 0.8)))


def test_layers_farther_away_are_smaller_and_fainter() -> None:
    _, drawn = Seeded(Rain(layers=4))("a", BLACK)
    assert [group["layer"] for group in drawn["layers"]] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    strengths = [group["strength"] for group in drawn["layers"][::3]]
    np.testing.assert_allclose(np.array(strengths[1:]) / strengths[:-1], 0.7, atol=1e-4)
    near, far = ([g["length"] for g in drawn["layers"] if g["layer"] == layer] for layer in (0, 3))
    assert max(far) < min(near)
    assert all(0.7 * drawn["length"] <= length <= 1.3 * drawn["length"] for length in near)


def test_strength_is_that_of_published_sets() -> None:
    """PSNR of 18 to 33 dB, as in Rain13K and DDN's 1400 images."""
    photographs = [skimage.data.chelsea()[80:200, 120:280], skimage.data.coffee()[150:270, 250:410]]
    psnr = []
    for number in range(10):
        for sharp in photographs:
            rain, _ = Seeded(Rain())(str(number), sharp)
            psnr.append(10 * np.log10(255**2 / np.square(rain.astype(float) - sharp).mean()))
    low, middle, high = np.percentile(psnr, [5, 50, 95])
    assert low > 16 and 21 < middle < 28 and high < 35


@pytest.mark.parametrize("settings", [
    {"angle": (-91, 0)}, {"length": (0, 5)}, {"width": (0, 1)}, {"density": (-1, 1)}, {"strength": (0, 1.1)},
    {"veil": (0.5, 0.4)}, {"layers": 0}, {"layers": 11},
])  # fmt: skip
def test_invalid_settings(settings: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        Rain(**settings)
