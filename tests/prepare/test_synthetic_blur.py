"""Camera shakes, their kernels, and the convolution."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data

from kdsr.prepare.synthesis import Seeded
from kdsr.prepare.synthetic_blur import Blur, blur, camera_path, rasterise, to_linear, to_srgb
from kdsr.runtime.errors import DataError, OptionError

LOPSIDED = np.array([[0, 0.1, 0], [0, 0.5, 0.3], [0.1, 0, 0]], np.float32)


def spread(points: np.ndarray) -> float:
    return float(np.linalg.norm(points[:, None] - points, axis=2).max())


@pytest.mark.parametrize("shake", [0.0, 0.5, 1.0])
def test_paths_have_the_given_extent(shake: float) -> None:
    for seed in range(5):
        path = camera_path(17, shake, np.random.default_rng(seed))
        assert spread(path) == pytest.approx(17)
        np.testing.assert_allclose(path.mean(axis=0), 0, atol=1e-9)
    assert spread(camera_path(0, shake, np.random.default_rng(0))) == 0


def test_shake_makes_paths_winding() -> None:
    def length(shake: float) -> float:
        """Relative to the path's extent."""
        paths = [camera_path(10, shake, np.random.default_rng(seed)) for seed in range(20)]
        return float(np.mean([np.linalg.norm(np.diff(path, axis=0), axis=1).sum() / 10 for path in paths]))

    straight, some, much = length(0), length(0.3), length(1)
    assert straight == pytest.approx(1) and 1.05 < some < much


def test_paths_have_inertia() -> None:
    """Velocities of neighbouring steps are correlated, those of distant ones are not."""
    near, far = [], []
    for seed in range(20):
        velocity = np.diff(camera_path(10, 1.0, np.random.default_rng(seed)), axis=0)
        velocity /= velocity.std()
        near.append((velocity[1:] * velocity[:-1]).sum(axis=1).mean())
        far.append((velocity[120:] * velocity[:-120]).sum(axis=1).mean())
    assert np.mean(near) > 0.9 * 2 * 0.9 and np.mean(far) < 0.5 * np.mean(near)


@pytest.mark.parametrize("shake", [0.0, 1.0])
@pytest.mark.parametrize("size", [0, 0.5, 3, 12.7, 40])
def test_kernels_sum_to_one_and_are_centred(size: float, shake: float) -> None:
    for seed in range(5):
        kernel = rasterise(camera_path(size, shake, np.random.default_rng(seed)))
        side = kernel.shape[0]
        assert kernel.shape == (side, side) and side % 2 == 1 and side <= 2 * size + 5
        assert kernel.sum() == pytest.approx(1, abs=1e-5) and kernel.min() >= 0
        offsets = np.arange(side) - side // 2
        assert abs((kernel.sum(axis=1) * offsets).sum()) < 1e-4
        assert abs((kernel.sum(axis=0) * offsets).sum()) < 1e-4


def test_kernels_have_sub_pixel_accuracy() -> None:
    """A straight path along x that is half a pixel off is split evenly between two rows."""
    x = np.linspace(-4, 4, 256)
    kernel = rasterise(np.stack([np.full(256, 0.5), x], axis=1))
    middle = kernel.shape[0] // 2
    np.testing.assert_allclose(kernel[middle], kernel[middle + 1], atol=1e-7)
    assert kernel[middle : middle + 2].sum() == pytest.approx(1)
    np.testing.assert_allclose(kernel[middle, middle - 3 : middle + 4], 0.5 / 8, rtol=0.01)
    np.testing.assert_allclose(rasterise(np.zeros((256, 2))), [[1]])


def test_blur_of_a_point_is_the_kernel() -> None:
    """A convolution: a correlation would give the kernel's mirror image."""
    point = np.zeros((9, 9, 3), np.float32)
    point[4, 5] = 1
    for channel in np.moveaxis(blur(point, LOPSIDED), 2, 0):
        np.testing.assert_allclose(channel[3:6, 4:7], LOPSIDED, atol=1e-6)
        assert channel.sum() == pytest.approx(1)
    large = rasterise(camera_path(30, 0.7, np.random.default_rng(0)))  # OpenCV takes Fourier's way here
    point = np.zeros((99, 99), np.float32)
    point[49, 49] = 1
    radius = large.shape[0] // 2
    result = blur(point, large)[49 - radius : 50 + radius, 49 - radius : 50 + radius]
    np.testing.assert_allclose(result, large, atol=1e-6)


def test_border_is_mirrored() -> None:
    ramp = np.tile(np.arange(5, dtype=np.float32), (5, 1))
    right = np.zeros((3, 3), np.float32)
    right[1, 0] = 1  # what lies one pixel to the right comes here
    np.testing.assert_allclose(blur(ramp, right)[2], [1, 2, 3, 4, 3], atol=1e-6)
    flat = blur(np.full((40, 41), 0.3, np.float32), rasterise(camera_path(20, 1, np.random.default_rng(1))))
    np.testing.assert_allclose(flat, 0.3, atol=1e-5)


def test_kernels_larger_than_the_image() -> None:
    with pytest.raises(DataError, match=r"3x2 pixels are too few for a kernel of 3; .*--min-size"):
        blur(np.zeros((2, 3), np.float32), LOPSIDED)
    assert blur(np.zeros((3, 3), np.float32), LOPSIDED).shape == (3, 3)


def test_linear_light() -> None:
    levels = np.linspace(0, 1, 256, dtype=np.float32)
    np.testing.assert_allclose(to_srgb(to_linear(levels)), levels, atol=1e-5)
    assert to_linear(np.float32(0.5)) == pytest.approx(0.21404, abs=1e-5)  # IEC 61966-2-1
    assert to_linear(np.float32(0.02)) == pytest.approx(0.02 / 12.92)
    step = np.zeros((31, 31), np.uint8)
    step[:, 16:] = 255
    half = np.array([[0, 0, 0], [0.0, 0.5, 0.5], [0, 0, 0]], np.float32)
    kernels = (("half", half),)
    edge = [Seeded(Blur(kernels=kernels, linear_light=linear))("a", step)[0][9, 16] for linear in (0, 1)]
    assert edge == [128, 188]  # half the light is 188


def test_measured_kernels_are_drawn_and_turned() -> None:
    kernels = (("a", LOPSIDED), ("b", np.eye(3, dtype=np.float32) / 3))
    image = np.zeros((9, 9), np.uint8)
    image[4, 4] = 250
    plain, seen = set(), set()
    for number in range(100):
        result, drawn = Seeded(Blur(kernels=kernels))(str(number), image)
        plain.add((drawn["kernel"], result.tobytes()))
        assert set(drawn) == {"task", "seed", "kernel"}
        result, drawn = Seeded(Blur(kernels=kernels[:1], turn=True))(str(number), image)
        expected = LOPSIDED[:, ::-1] if drawn["mirrored"] else LOPSIDED
        expected = np.rot90(expected, drawn["quarter_turns"]) * 250
        np.testing.assert_allclose(result[3:6, 3:6], expected, atol=0.51)
        seen.add((drawn["mirrored"], drawn["quarter_turns"]))
    assert len(plain) == 2 and {name for name, _ in plain} == {"a", "b"} and len(seen) == 8


def test_parameters_are_what_was_applied() -> None:
    cat = skimage.data.chelsea()[80:160, 120:216]
    for number in range(5):
        degraded, drawn = Seeded(Blur(size=(4, 9), shake=(0.2, 0.6)))(str(number), cat)
        assert 4 <= drawn["size"] <= 9 and 0.2 <= drawn["shake"] <= 0.6
        assert 0 < np.abs(degraded.astype(int) - cat).mean() < 20
        assert degraded.mean() == pytest.approx(cat.mean(), abs=1)  # light is kept


@pytest.mark.parametrize("settings", [{"size": (-1, 2)}, {"shake": (0, 2)}, {"turn": True}])
def test_invalid_settings(settings: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        Blur(**settings)
