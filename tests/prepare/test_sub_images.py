"""Cutting photographs into GT/LQ pairs."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import skimage.data

from kdsr.data.resize import imresize, mod_crop
from kdsr.prepare.sub_images import GT, Cutting, cut, encode_png
from kdsr.runtime.errors import OptionError


@pytest.mark.parametrize(("length", "thresh", "expected"), [
    (480, 0, [0, 96, 192, 288]),  # fits
    (492, 0, [0, 96, 192, 288, 300]),
    (492, 12, [0, 96, 192, 288]),
    (492, 11, [0, 96, 192, 288, 300]),
    (192, 0, [0]),
    (120, 0, [0]),  # smaller than the crop: kept whole
])  # fmt: skip
def test_starts(length: int, thresh: int, expected: list[int]) -> None:
    assert Cutting((4,), 12, 192, 96, thresh).starts(length) == expected


@pytest.mark.parametrize(("scales", "sizes", "message"), [
    ((7,), (7, 240, 120), r"crop 240: .* a multiple of 7 for scales 7"),
    ((2, 9), (18, 36, 12), r"step 12: .* a multiple of 18 for scales 2, 9"),
    ((2, 3), (4,), "multiples of 4: must be a multiple of 6"),
    ((4,), (0,), "multiples of 0: must be a multiple of 4"),
    ((4,), (4, -8, 4), "crop -8"),
])  # fmt: skip
def test_sizes_that_would_not_be_aligned(
    scales: tuple[int, ...], sizes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        Cutting(scales, *sizes)


def test_whole_image() -> None:
    image = skimage.data.chelsea()[:101, :99]
    ((ending, pieces),) = cut(image, Cutting((2, 3), 6))
    assert ending == ""
    assert {scale: piece.shape for scale, piece in pieces.items()} == {
        GT: (96, 96, 3), 2: (48, 48, 3), 3: (32, 32, 3)}  # fmt: skip
    np.testing.assert_array_equal(pieces[GT], image[:96, :96])


@pytest.mark.parametrize("grey", [False, True])
def test_pieces_are_parts_of_the_whole(grey: bool) -> None:
    """LQ is made before cutting, and aligned with its ground truth."""
    image = skimage.data.chelsea()[:121, :145]
    image = image[..., 0] if grey else image
    whole, small = image[:120, :144], imresize(image[:120, :144], 1 / 4)
    pieces = dict(cut(image, Cutting((4,), 12, 48, 48)))
    assert list(pieces) == [f"_s{number:03d}" for number in range(1, 10)]
    tops, lefts = (0, 48, 72), (0, 48, 96)
    for number, piece in enumerate(pieces.values()):
        top, left = tops[number // 3], lefts[number % 3]
        np.testing.assert_array_equal(piece[GT], whole[top : top + 48, left : left + 48])
        lq = small[top // 4 : top // 4 + 12, left // 4 : left // 4 + 12]
        np.testing.assert_array_equal(piece[4], lq)


def test_image_smaller_than_the_multiple_gives_nothing() -> None:
    assert list(cut(np.zeros((11, 40, 3), np.uint8), Cutting((4,), 12))) == []


def test_mod_crop() -> None:
    assert mod_crop(np.zeros((25, 12), np.uint8), 12).shape == (24, 12)


def test_png_keeps_the_pixels() -> None:
    image = skimage.data.chelsea()[:20, :20]
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(encode_png(image), np.uint8), -1), image)
