"""The scattering model in numbers, random depth, and depth maps from files."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from kdsr.prepare.synthesis import Seeded
from kdsr.prepare.synthetic_haze import Haze, add_haze, find_depth_maps, read_depth, smooth_depth
from kdsr.runtime.errors import DataError, OptionError


def test_the_equation_on_a_constant_image() -> None:
    scene = np.full((4, 5, 3), 0.2, np.float32)
    depth = np.full((4, 5), math.log(2) / 0.7, np.float32)  # t is one half
    hazy = add_haze(scene, depth, 0.7, [1.0, 0.8, 0.6])
    np.testing.assert_allclose(hazy, np.broadcast_to([0.6, 0.5, 0.4], hazy.shape), atol=1e-6)
    np.testing.assert_allclose(add_haze(scene[..., 0], depth, 0.7, [1.0]), 0.6, atol=1e-6)


def test_near_points_are_clear_and_far_points_are_airlight() -> None:
    scene = np.random.default_rng(0).random((3, 4, 3)).astype(np.float32)
    depth = np.zeros((3, 4), np.float32)
    depth[0] = 100
    hazy = add_haze(scene, depth, 1.0, [0.9, 0.9, 0.9])
    np.testing.assert_array_equal(hazy[1:], scene[1:])
    np.testing.assert_allclose(hazy[0], 0.9, atol=1e-6)
    np.testing.assert_array_equal(add_haze(scene, depth, 0, [0.9, 0.9, 0.9]), scene)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (1, 40), (40, 1), (1, 1), (7, 200)])
def test_random_depth_is_smooth_and_fills_its_range(shape: tuple[int, int]) -> None:
    depth = smooth_depth(shape, 0.5, np.random.default_rng(0))
    assert depth.shape == shape and depth.min() == 0
    assert depth.max() == pytest.approx(0.0 if shape == (1, 1) else 1.0)
    for axis in (0, 1):
        if shape[axis] >= 40:  # no step of more than a few per cent of the range
            assert np.abs(np.diff(depth, axis=axis)).max() < 6 / max(shape)


def test_gradient_is_the_share_of_the_ramp() -> None:
    ramp = smooth_depth((50, 30), 1.0, np.random.default_rng(0))
    np.testing.assert_allclose(ramp, np.repeat(np.linspace(1, 0, 50)[:, None], 30, axis=1), atol=1e-6)
    fields = [smooth_depth((50, 30), 0.0, np.random.default_rng(seed)) for seed in range(40)]
    # without one, no direction is preferred
    tilt = [field[:10].mean() - field[-10:].mean() for field in fields]
    assert abs(np.mean(tilt)) < 3 * np.std(tilt) / math.sqrt(len(tilt))


def test_parameters_are_what_was_applied(tmp_path: Path) -> None:
    """The image, reproduced from the recorded parameters."""
    scene = np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    depth = np.linspace(0, 1, 12 * 16).reshape(12, 16)
    np.save(tmp_path / "one.npy", 3 * depth)  # the unit does not matter
    hazy, drawn = Seeded(Haze(depth=find_depth_maps(tmp_path)), 5)("one", scene)
    assert 0.6 <= drawn["beta"] <= 1.8 and drawn["depth"] == "one.npy" and "gradient" not in drawn
    assert len(drawn["airlight"]) == 3 and max(drawn["airlight"]) - min(drawn["airlight"]) <= 0.04
    t = np.exp(-drawn["beta"] * depth)[..., None]
    expected = np.rint(scene * t + 255 * np.array(drawn["airlight"]) * (1 - t))
    assert np.abs(hazy - expected).max() <= 1  # float32 rounds a half otherwise
    assert (hazy == expected).mean() > 0.99


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_depth_images_of_8_and_16_bits(tmp_path: Path, depth: type) -> None:
    image = np.array([[0, 50], [100, 200]], depth)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    np.testing.assert_allclose(read_depth(tmp_path / "a.png"), [[0, 0.25], [0.5, 1]])
    if depth is np.uint8:
        cv2.imwrite(str(tmp_path / "a.png"), np.repeat(image[..., None], 3, axis=2))
        np.testing.assert_allclose(read_depth(tmp_path / "a.png"), [[0, 0.25], [0.5, 1]])


@pytest.mark.parametrize(("array", "message"), [
    (np.zeros((3, 3)), "not zero everywhere"),
    (np.array([[1.0, -1.0]]), "not negative"),
    (np.array([[1.0, np.nan]]), "finite"),
    (np.ones((2, 2, 2)), r"shape \(2, 2, 2\)"),
    (np.array([["far"]]), "depth map is grey"),
])  # fmt: skip
def test_arrays_that_are_not_depth_maps(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=f"a.npy.*{message}"):
        read_depth(tmp_path / "a.npy")


def test_invalid_depth_files(tmp_path: Path) -> None:
    for content in (b"text", b""):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(DataError, match="a.npy is not an array file"):
            read_depth(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.ones((4, 5)))
    with pytest.raises(DataError, match=r"b: its depth map .*b.npy is 5x4, the image 5x5"):
        Seeded(Haze(depth=find_depth_maps(tmp_path)))("b", np.zeros((5, 5, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), np.ones((4, 5)))
    with pytest.raises(DataError, match="b.npy and .*b.png are both depth maps of b"):
        find_depth_maps(tmp_path)


def test_missing_depth_maps_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        find_depth_maps(tmp_path / "absent")
    with pytest.raises(DataError, match="There is no depth map in"):
        find_depth_maps(tmp_path)
    np.save(tmp_path / "a.npy", np.ones((4, 5)))
    haze = Haze(depth=find_depth_maps(tmp_path))
    haze.check_names(["a"])
    with pytest.raises(DataError, match="6 images have no depth map of the same name: b, c, d, e, f, …"):
        haze.check_names("abcdefg")
    Haze().check_names("abc")  # random depth needs none


@pytest.mark.parametrize("settings", [
    {"airlight": (0.5, 1.1)}, {"beta": (-1, 1)}, {"gradient": (0, 2)}, {"tint": -0.1}, {"beta": (2, 1)},
])  # fmt: skip
def test_invalid_settings(settings: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        Haze(**settings)
