"""``kdsr bench validation``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.runtime.errors import OptionError


def write(options: dict[str, Any], folder: Path) -> str:
    file = folder / "run.yml"
    file.write_text(yaml.safe_dump(options), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(("batch", "passes"), [(None, 4), (3, 2)])
def test_both_loops_measure_the_same(
    run_options: dict[str, Any], tmp_path: Path, batch: int | None, passes: int
) -> None:
    run_options["val"]["metrics"]["ssim"] = {"type": "calculate_ssim", "crop_border": 2}
    run_options["val"]["batch_size"] = batch
    options = [
        "--repeat",
        "2",
        "--threads",
        "1",
        "--save-img",
        "--json",
        str(tmp_path / "out" / "times.json"),
    ]
    result = CliRunner().invoke(app, ["bench", "validation", "-opt", write(run_options, tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert all(text in result.output for text in ("outside, s", "kdsr ÷ BasicSR", "held_out, ssim"))
    runs = json.loads((tmp_path / "out" / "times.json").read_text(encoding="utf-8"))["runs"]
    assert {name: [run["passes"] for run in each] for name, each in runs.items()} == {
        "kdsr": [passes] * 2,
        "BasicSR": [4] * 2,
    }
    for ours, stock in zip(*runs.values(), strict=True):
        assert ours["total"] > ours["in_network"] > 0
        for metric, value in stock["values"]["held_out"].items():
            assert ours["values"]["held_out"][metric] == pytest.approx(value, abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run.yml"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "SRModel"}, "model_type: SRModel is BasicSR's own; give KDModel"),
        ({"val": {"val_freq": 1, "metrics": None}}, "val.metrics: missing"),
        ({"val": {"val_freq": 1, "batch_size": 0}}, "val.batch_size: 0"),
    ],
)
def test_options_that_cannot_be_compared(
    run_options: dict[str, Any], tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    file = write(run_options | changes, tmp_path)
    result = CliRunner().invoke(app, ["bench", "validation", "-opt", file])
    assert isinstance(result.exception, OptionError)
    assert any(problem in line for line in result.exception.problems)
