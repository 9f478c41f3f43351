"""The table of a comparison."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

import kdsr  # noqa: F401
from kdsr.runtime.errors import DataError
from kdsr.tools import report


@pytest.fixture
def photographs() -> dict[str, report.Image]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(30, 220, (40, 48, 3), dtype=np.uint8) for name in ("a", "b")}


@pytest.fixture
def methods(photographs: dict[str, report.Image]) -> list[report.Method]:
    def off_by(step: int) -> dict[str, report.Image]:
        return {name: image + np.uint8(step) for name, image in photographs.items()}

    return [
        report.Method("bicubic", off_by(8)),
        report.Method("student", off_by(4), 1234),
        report.Method("teacher", off_by(2), 56789, competes=False),
    ]


def test_scores_agree_with_the_definition(photographs, methods):
    scores = report.score(photographs, methods, border=4)
    # A grey shift of d is one of d · 219/255 on Y (ITU-R BT.601, as BasicSR rounds it only at the end).
    for method, step in (("bicubic", 8), ("student", 4), ("teacher", 2)):
        expected = 20 * math.log10(255 / (step * 219 / 255))
        assert report.mean_scores(scores, method)[0] == pytest.approx(expected, abs=0.05)
    assert list(scores["image"]) == ["a", "b", "mean"] * 3


def test_channel_order_is_rgb(photographs):
    image = photographs["a"]
    red, blue = image.copy(), image.copy()
    red[..., 0] += 10
    blue[..., 2] += 10
    # Y weighs red by 65.481 and blue by 24.966
    difference = report.measure(blue, image, 0)[0] - report.measure(red, image, 0)[0]
    assert difference == pytest.approx(20 * math.log10(65.481 / 24.966), abs=0.05)


def test_table_holds_every_value_mean_and_parameters(photographs, methods):
    scores = report.score(photographs, methods, border=4)
    table = report.comparison(scores)
    assert list(table.columns) == ["bicubic", "student", "teacher"]
    assert list(table.index) == ["a", "b", "mean", "parameters"]
    assert list(table.loc["parameters"]) == ["–", "1,234", "56,789"]
    psnr, ssim = report.mean_scores(scores, "student")
    assert table.loc["mean", "student"] == f"{psnr:.2f} / {ssim:.4f}"
    lines = report.as_text(table).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are not aligned"
    assert [line.split()[0] for line in lines if not line.startswith("-")] == [
        "PSNR",
        "a",
        "b",
        "mean",
        "parameters",
    ]


def test_files(photographs, methods, tmp_path):
    scores = report.score(photographs, methods, border=4)
    csv_file, markdown_file = report.write_table(scores, tmp_path / "new")
    with csv_file.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert float(rows[3]["psnr"]) == report.measure(methods[1].images["a"], photographs["a"], 4)[0]
    assert rows[0]["parameters"] == "" and rows[3]["parameters"] == "1234"
    lines = markdown_file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1


def test_load_rgb_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.png"):
        report.load_rgb(tmp_path / "none.png")
