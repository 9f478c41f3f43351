"""``kdsr demo``, run for two iterations with networks of random weights."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import pandas as pd
import pytest
import torch
from basicsr.archs import build_network

import kdsr  # noqa: F401
from kdsr.pipeline.options import load
from kdsr.runtime.errors import CheckpointError
from kdsr.tools import demo, report

ITERS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, pd.DataFrame, list[str]]]:
    """Folder of the report, scores and what was said."""
    here = tmp_path_factory.mktemp("demo")
    before = Path.cwd()
    os.chdir(here)
    try:
        torch.manual_seed(0)
        options = load(demo.FILES[demo.DCKD])
        for key in ("t", "vqgan"):
            file = Path(options["path"][f"pretrain_network_{key}"])
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"params": build_network(options[f"network_{key}"]).state_dict()}, file)
        lines: list[str] = []
        scores = demo.run_demo(Path("experiments/demo"), ITERS, lines.append)
        yield here / "experiments/demo", scores, lines
    finally:
        os.chdir(before)


def logged(folder: Path, network: str) -> dict[str, float]:
    """PSNR by photograph, as the training itself measured it last."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == network and row["metric"] == "psnr"]
    return {row["image"]: float(row["value"]) for row in rows}


def reported(scores: pd.DataFrame, method: str) -> dict[str, float]:
    rows = scores[(scores["method"] == method) & (scores["image"] != report.MEAN)]
    return dict(zip(rows["image"], rows["psnr"], strict=True))


def test_report_agrees_with_what_the_runs_measured(finished):
    out, scores, _ = finished
    scratch, dckd = out / "demo_Scratch_EDSR_x4", out / "demo_DCKD_EDSR_x4"
    assert reported(scores, demo.SCRATCH) == pytest.approx(logged(scratch, "student"), abs=1e-6)
    assert reported(scores, demo.DCKD) == pytest.approx(logged(dckd, "student"), abs=1e-6)
    assert reported(scores, demo.TEACHER) == pytest.approx(logged(dckd, "teacher"), abs=1e-6)
    assert set(reported(scores, demo.BICUBIC)) == {"chelsea", "coffee", "rocket"}
    assert all(psnr > 25 for psnr in reported(scores, demo.BICUBIC).values())


def test_students_have_the_same_size_and_differ(finished):
    out, scores, _ = finished
    sizes = scores.groupby("method")["parameters"].first()
    assert sizes[demo.DCKD] == sizes[demo.SCRATCH] < sizes[demo.TEACHER] / 30
    first, second = (
        torch.load(out / run / "models/net_g_latest.pth", weights_only=True)["params_ema"]["conv_last.weight"]
        for run in ("demo_Scratch_EDSR_x4", "demo_DCKD_EDSR_x4")
    )
    assert not torch.equal(first, second)


def test_every_file_that_is_named_is_there(finished):
    out, _, lines = finished
    named = [Path(line.split()[-1]) for line in lines if "experiments/demo" in line]
    assert len(named) == 8
    assert all((out.parents[1] / path).exists() for path in named)
    picture = cv2.imread(str(out / "comparison.png"))
    assert picture is not None and min(picture.shape[:2]) > 800
    assert len(list((out / "images").glob("*.png"))) == 3 * 4


def test_says_who_is_ahead(finished):
    _, scores, lines = finished
    text = " ".join(" ".join(lines).split())
    gain = report.mean_scores(scores, demo.DCKD)[0] - report.mean_scores(scores, demo.SCRATCH)[0]
    assert f"{gain:+.2f} dB" in text
    expected = "ahead of" if gain > 0.005 else "behind" if gain < -0.005 else "level with"
    assert f"is {expected} the one without a teacher" in text


@pytest.mark.parametrize(
    ("dckd", "alone", "says", "better"),
    [((30.0, 28.0), (29.0, 28.5), "ahead of", 1), ((28.0, 28.0), (29.0, 28.5), "behind", 0)],
)
def test_verdict_counts_photographs(dckd, alone, says, better):
    rows = []
    for method, values in ((demo.DCKD, dckd), (demo.SCRATCH, alone)):
        rows += [(method, image, psnr, 0.8) for image, psnr in zip("ab", values, strict=True)]
        rows.append((method, report.MEAN, sum(values) / 2, 0.8))
    scores = pd.DataFrame(rows, columns=["method", "image", "psnr", "ssim"])
    text = demo.verdict(scores, 100)
    assert says in text and f"on {better} of 2" in text


def test_missing_teacher_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(CheckpointError, match=r"pretrain_network_t: there is no file .*EDSR_x4\.pth"):
        demo.run_demo(tmp_path / "out", ITERS, print)
    assert not any(tmp_path.iterdir())
