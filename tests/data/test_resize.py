"""imresize against Matlab's own results."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr

from kdsr.data.resize import imresize


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("benchmark", ["Set5", "Set14"])
def test_equals_matlab(shared: Path, benchmark: str, scale: int) -> None:
    """Set14 has a grey image. Inside the borders no pixel differs; with that Matlab's border none at all."""
    files = sorted((shared / "data" / benchmark / f"GT_x{scale}").iterdir())
    assert len(files) == {"Set5": 5, "Set14": 14}[benchmark]
    for file in files:
        gt, expected = read(file), read(shared / "data" / benchmark / f"LR_x{scale}" / file.name)
        np.testing.assert_array_equal(imresize(gt, 1 / scale, border="replicate"), expected)
        inside = (slice(2, -2), slice(2, -2))
        np.testing.assert_array_equal(imresize(gt, 1 / scale)[inside], expected[inside])


@pytest.mark.parametrize(("benchmark", "grey_as_colour", "expected"), [
    ("Set5", False, 28.43), ("Set14", False, 26.00), ("Set14", True, 26.09)])  # fmt: skip
def test_bicubic_baseline(shared: Path, benchmark: str, grey_as_colour: bool, expected: float) -> None:
    """Published numbers use Set14's grey image directly; as three channels its Y range is narrower."""
    values = []
    for file in sorted((shared / "data" / benchmark / "GT_x4").iterdir()):
        gt, lq = read(file), read(shared / "data" / benchmark / "LR_x4" / file.name)
        if gt.ndim == 2 and grey_as_colour:
            gt, lq = (cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) for image in (gt, lq))
        values.append(calculate_psnr(imresize(lq, 4), gt, crop_border=4, test_y_channel=True))
    assert np.mean(values) == pytest.approx(expected, abs=0.006)


def test_constant_and_ramp_stay() -> None:
    assert (imresize(np.full((12, 9, 3), 77, np.uint8), 1 / 3) == 77).all()
    ramp = np.tile(np.arange(0, 200, 2, dtype=np.uint8), (8, 1))
    small = imresize(ramp, 1 / 2)[:, 4:-4].astype(int)
    assert (np.diff(small, axis=1) == 4).all()


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4])
def test_sizes_round_up(scale: float) -> None:
    image = np.zeros((13, 27), np.uint8)
    height, width = imresize(image, scale).shape
    exact = {1 / 2: (7, 14), 1 / 3: (5, 9), 1 / 4: (4, 7)}.get(scale, (13 * scale, 27 * scale))
    assert (height, width) == exact


def test_tiny_images_reach_beyond_their_mirror_image() -> None:
    image = np.array([[10, 200]], np.uint8)
    for border in ("symmetric", "replicate"):
        assert imresize(image, 1 / 4, border=border).shape == (1, 1)
    # of the mirrored pair, four taps of both values count alike
    assert imresize(image, 1 / 2)[0, 0] == 105


def test_refuses_what_matlab_would_round_differently() -> None:
    with pytest.raises(TypeError, match="float32"):
        imresize(np.zeros((4, 4), np.float32), 0.5)
    with pytest.raises(ValueError, match="shape"):
        imresize(np.zeros(4, np.uint8), 0.5)
