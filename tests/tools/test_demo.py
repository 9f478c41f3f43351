"""``kdsr demo``, run for two iterations with teachers of random weights."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import pandas as pd
import pytest
import torch
from basicsr.archs import build_network
from typer.testing import CliRunner

import kdsr  # noqa: F401
from kdsr import cli
from kdsr.options.files import load
from kdsr.runtime.errors import CheckpointError, OptionError
from kdsr.tools import demo, report
from kdsr.tools.demo_tasks import SCRATCH, TASKS, TEACHER, Task

ITERS = 2
ROUNDING = 1e-4  # dB: some pixels of 8 bits that another order of sums rounds to the next value


@dataclass(frozen=True)
class Finished:
    """A finished demonstration: task, folder of the report, scores, output."""

    task: Task
    out: Path
    scores: pd.DataFrame
    lines: list[str]

    def run(self, student: str) -> Path:
        return self.out / self.task.files[student].stem

    def reported(self, method: str) -> dict[str, float]:
        rows = self.scores[(self.scores["method"] == method) & (self.scores["image"] != report.MEAN)]
        return dict(zip(rows["image"], rows["psnr"], strict=True))


def write_frozen(task: Task) -> None:
    options = load(task.files[task.method])
    for key in demo.frozen_networks(options):
        file = Path(options["path"][f"pretrain_network_{key}"])
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"params": build_network(options[f"network_{key}"]).state_dict()}, file)


@pytest.fixture(scope="module", params=TASKS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    here = tmp_path_factory.mktemp("demo")
    before = Path.cwd()
    os.chdir(here)
    try:
        torch.manual_seed(0)
        task = TASKS[request.param]
        write_frozen(task)
        lines: list[str] = []
        scores = demo.run_demo(task, task.out, ITERS, lines.append)
        yield Finished(task, here / task.out, scores, lines)
    finally:
        os.chdir(before)


def logged(folder: Path, network: str) -> dict[str, float]:
    """PSNR by photograph, from the training's last validation."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == network and row["metric"] == "psnr"]
    return {row["image"]: float(row["value"]) for row in rows}


def test_report_agrees_with_what_the_runs_measured(finished: Finished) -> None:
    method = finished.task.method
    for student in (SCRATCH, method):
        assert finished.reported(student) == pytest.approx(
            logged(finished.run(student), "student"), abs=ROUNDING
        )
    assert finished.reported(TEACHER) == pytest.approx(logged(finished.run(method), "teacher"), abs=ROUNDING)
    baseline = finished.reported(finished.task.baseline)
    assert set(baseline) == {"chelsea", "coffee", "rocket"}
    assert all(15 < psnr < 40 for psnr in baseline.values())


def test_students_have_the_same_size_and_differ(finished: Finished) -> None:
    method = finished.task.method
    sizes = finished.scores.groupby("method")["parameters"].first()
    assert sizes[method] == sizes[SCRATCH] < sizes[TEACHER] / 9
    first, second = (
        torch.load(finished.run(student) / "models/net_g_latest.pth", weights_only=True)["params_ema"]
        for student in (SCRATCH, method)
    )
    assert first.keys() == second.keys()
    assert not all(torch.equal(first[key], second[key]) for key in first)


def test_every_file_that_is_named_is_there(finished: Finished) -> None:
    named = [Path(line.split()[-1]) for line in finished.lines if str(finished.task.out) in line]
    assert len(named) == 8
    assert all((finished.out.parents[1] / path).exists() for path in named)
    picture = cv2.imread(str(finished.out / "comparison.png"))
    assert picture is not None and min(picture.shape[:2]) > 800
    assert len(list((finished.out / "images").glob("*.png"))) == 3 * 4


def test_the_summary_names_the_better_student(finished: Finished) -> None:
    text, method = " ".join(" ".join(finished.lines).split()), finished.task.method
    gain = report.mean_scores(finished.scores, method)[0] - report.mean_scores(finished.scores, SCRATCH)[0]
    assert f"{gain:+.2f} dB" in text
    expected = "ahead of" if gain > 0.005 else "behind" if gain < -0.005 else "level with"
    assert f"the {method} student is {expected} the one without a teacher" in text


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_both_students_are_trained_alike(task: Task) -> None:
    alone, distilled = load(task.files[SCRATCH]), load(task.files[task.method])
    for section in ("datasets", "network_g", "manual_seed", "scale", "precision"):
        assert alone[section] == distilled[section]
    for key in ("optim_g", "scheduler", "total_iter", "warmup_iter", "ema_decay", "pixel_opt"):
        assert alone["train"][key] == distilled["train"][key]
    assert {key: value for key, value in alone["val"].items() if key != "teacher"} == {
        key: value for key, value in distilled["val"].items() if key != "teacher"
    }


@pytest.mark.parametrize(
    ("distilled", "alone", "says", "better"),
    [((30.0, 28.0), (29.0, 28.5), "ahead of", 1), ((28.0, 28.0), (29.0, 28.5), "behind", 0)],
)
def test_verdict_counts_photographs(
    distilled: tuple[float, ...], alone: tuple[float, ...], says: str, better: int
) -> None:
    rows = []
    for method, values in (("SLKD", distilled), (SCRATCH, alone)):
        rows += [(method, image, psnr, 0.8) for image, psnr in zip("ab", values, strict=True)]
        rows.append((method, report.MEAN, sum(values) / 2, 0.8))
    scores = pd.DataFrame(rows, columns=["method", "image", "psnr", "ssim"])
    text = demo.verdict(scores, "SLKD", 100)
    assert f"SLKD student is {says}" in text and f"on {better} of 2" in text


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_missing_teacher_is_named_before_anything_is_written(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"pretrain_network_t: there is no file .*(EDSR_x4|NAFNet_rain)\.pth"
    ):
        demo.run_demo(task, tmp_path / "out", ITERS, print)
    assert not any(tmp_path.iterdir())


def test_rain_on_each_sub_image_is_its_own_and_of_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    TASKS["rain"].prepare()
    folder = Path("datasets/sample_rain/train")
    drawn = [json.loads(line) for line in (folder / "parameters.jsonl").read_text().splitlines()]
    assert len({entry["angle"] for entry in drawn}) == len(drawn) == len(list((folder / "GT").iterdir())) > 20
    first = {path.name: path.read_bytes() for path in (folder / "LQ").iterdir()}
    TASKS["rain"].prepare()  # again, over what it has made
    assert {path.name: path.read_bytes() for path in (folder / "LQ").iterdir()} == first
    (folder / "settings.json").unlink()
    with pytest.raises(OptionError, match=r"sample_rain/train exists and was not made with these settings"):
        TASKS["rain"].prepare()


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    result = CliRunner().invoke(cli.app, ["demo", "--task", "rian"])
    assert isinstance(result.exception, OptionError)
    assert "--task 'rian'" in str(result.exception) and "rain" in str(result.exception)
