"""The picture of a comparison."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

import kdsr  # noqa: F401
from kdsr.tools import crops, report


@pytest.fixture
def gt() -> report.Image:
    image = np.full((120, 160, 3), 128, dtype=np.uint8)
    image[::4] = 90  # detail everywhere
    return image


def differing_at(gt: report.Image, top: int, left: int, step: int) -> report.Image:
    image = gt.copy()
    image[top : top + 20, left : left + 20] += np.uint8(step)
    return image


def test_crop_covers_where_methods_differ(gt):
    top, left = crops.pick_crop(gt, [gt, differing_at(gt, 70, 100, 40)], 24, border=4)
    assert 66 <= top <= 70 and 96 <= left <= 100


def test_crop_does_not_depend_on_who_is_better(gt):
    other = differing_at(gt, 30, 20, 40)
    assert crops.pick_crop(gt, [gt, other], 24) == crops.pick_crop(gt, [other, gt], 24)


def test_crop_avoids_the_border(gt):
    top, left = crops.pick_crop(gt, [gt, differing_at(gt, 0, 0, 40)], 24, border=6)
    assert (top, left) == (6, 6)


def test_crop_of_a_small_image_is_the_image(gt):
    small = gt[:20, :30]
    assert crops.pick_crop(small, [small, differing_at(small, 0, 0, 40)], 64, border=4) == (0, 0)


def test_picture_shows_the_crops(gt, tmp_path):
    methods = [
        report.Method("bicubic", {"p": differing_at(gt, 70, 100, 60)}),
        report.Method("student", {"p": differing_at(gt, 70, 100, 20)}, 1000),
    ]
    scores = report.score({"p": gt}, methods, 4)
    figure = crops.draw({"p": gt}, methods, scores, title="title", caption="caption", crop=24)
    texts = [axes.get_xlabel() for axes in figure.axes]
    psnr, ssim = report.mean_scores(scores, "student")
    assert texts == ["p", "PSNR / SSIM", texts[2], f"{psnr:.2f} / {ssim:.4f}"]
    assert [axes.xaxis.label.get_fontweight() for axes in figure.axes[2:]] == ["normal", "bold"]
    top, left = crops.pick_crop(gt, [method.images["p"] for method in methods], 24, 4)
    shown = figure.axes[3].images[0].get_array()
    assert np.array_equal(shown, methods[1].images["p"][top : top + 24, left : left + 24])
    picture = cv2.imread(str(crops.write_picture(figure, tmp_path / "new" / "p.png")))
    assert picture is not None and picture.shape[1] > 900
