"""Common parts of the synthetic degradations: ranges, seeds, 8 bits."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import skimage.data

from kdsr.prepare.synthesis import Degradation, Seeded, as_8bit, as_float, check_range, draw, generator_for
from kdsr.prepare.synthetic_blur import Blur
from kdsr.prepare.synthetic_haze import Haze
from kdsr.prepare.synthetic_noise import Noise
from kdsr.prepare.synthetic_rain import Rain
from kdsr.runtime.errors import DataError, OptionError

ALL: list[Degradation] = [Rain(), Blur(), Haze(), Noise()]


@pytest.fixture(scope="module")
def cat() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.chelsea()[80:160, 120:216])


@pytest.mark.parametrize(("limits", "message"), [
    ((3, 2), "size 3,2: the range is reversed; give 2,3"),
    ((-1, 2), "size -1,2: must not be below 0"),
    ((0, 12), "size 0,12: must not be above 10"),
    ((11, 11), "size 11: must not be above 10"),
    ((0, math.nan), "finite"),
    ((-math.inf, 1), "finite"),
])  # fmt: skip
def test_invalid_ranges(limits: tuple[float, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_range("size", limits, 0, 10)


def test_ends_belong_to_a_range() -> None:
    check_range("size", (0, 10), 0, 10)


def test_draws_fill_their_range() -> None:
    generator = np.random.default_rng(0)
    values = [draw(generator, (2, 5)) for _ in range(300)]
    assert min(values) == pytest.approx(2, abs=0.05) and max(values) == pytest.approx(5, abs=0.05)
    assert draw(generator, (0.3, 0.3)) == 0.3


def test_8_bits_survive_the_way_through_floats() -> None:
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(as_8bit(as_float(levels)), levels)
    np.testing.assert_array_equal(as_8bit(np.array([-0.5, 0.4 / 255, 0.6 / 255, 1.5])), [0, 0, 1, 255])


def test_generators_depend_on_seed_and_name() -> None:
    def first(seed: int, name: str) -> float:
        return float(generator_for(seed, name).random())

    assert first(0, "a") == first(0, "a")
    assert len({first(seed, name) for seed in (-1, 0, 1) for name in ("a", "b", "0/a", "")}) == 12


@pytest.mark.parametrize("degradation", ALL, ids=lambda entry: entry.name)
def test_seed_and_name_determine_the_result(degradation: Degradation, cat: np.ndarray) -> None:
    before = cat.copy()
    image, parameters = Seeded(degradation, 3)("cat", cat)
    again, same = Seeded(degradation, 3)("cat", cat)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(cat, before)  # the photograph is left as it is
    assert parameters == same == json.loads(json.dumps(parameters))
    assert (parameters["task"], parameters["seed"]) == (degradation.name, 3)
    assert image.shape == cat.shape and image.dtype == np.uint8
    for seed, name in ((4, "cat"), (3, "dog")):
        assert (Seeded(degradation, seed)(name, cat)[0] != image).any()


@pytest.mark.parametrize("degradation", ALL, ids=lambda entry: entry.name)
def test_grey_images_stay_grey(degradation: Degradation, cat: np.ndarray) -> None:
    image, _ = Seeded(degradation)("cat", cat[..., 0])
    assert image.shape == cat.shape[:2] and (image != cat[..., 0]).any()


@pytest.mark.parametrize("degradation", ALL, ids=lambda entry: entry.name)
def test_settings_are_what_a_file_holds(degradation: Degradation) -> None:
    settings = Seeded(degradation, 5).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["task"] == degradation.name and settings["seed"] == 5 and len(settings) > 2


def test_errors_name_the_image(cat: np.ndarray) -> None:
    with pytest.raises(DataError, match="^tiny: 4x4 pixels are too few for a kernel of"):
        Seeded(Blur(size=(20, 20)))("tiny", cat[:4, :4])
