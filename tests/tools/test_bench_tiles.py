"""``kdsr bench tiles``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.runtime.errors import OptionError
from kdsr.tools import bench_tiles
from kdsr.tools.bench_tiles import Cost, measure, parse_size, prepare, summary


@pytest.fixture
def file(run_options: dict[str, Any], tmp_path: Path) -> Path:
    """A training whose data and checkpoints are elsewhere."""
    options = copy.deepcopy(run_options)
    for dataset in options["datasets"].values():
        dataset.update(dataroot_gt="nowhere", dataroot_lq="nowhere")
    options["path"]["pretrain_network_g"] = "nowhere.pth"
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return path


@pytest.mark.parametrize("train", [True, False])
def test_an_image_is_restored_as_a_test_would(file: Path, train: bool) -> None:
    if not train:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
        del options["train"], options["logger"]
        options["datasets"] = {"test_1": options["datasets"]["val"]}
        file.write_text(yaml.safe_dump(options), encoding="utf-8")
    opt = prepare(file, ["num_gpu=0"])
    opt["val"].update(tile=16, tile_overlap=4)
    cost = measure(opt, 40, 28)
    assert (cost.passes, cost.largest) == (6, (16, 16))
    assert cost.seconds > 0 and not cost.peak < cost.before
    opt["val"].update(tile=None)
    cost = measure(opt, 40, 28)
    assert (cost.passes, cost.largest) == (1, (28, 40))


def test_the_table() -> None:
    table = summary({"256": Cost(9, (128, 256), 3.21, 400, 512.4), "whole image": None})
    assert table.loc["256"].tolist() == ["9", "256×128", "3.2", "512"]
    assert table.loc["whole image"].tolist() == ["", "", "", "does not fit"]


@pytest.mark.parametrize("text", ["3840", "3840x", "3840x-1", "0x5", "axb", "3x4x5"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(OptionError, match="--size: .* is not a size; give WIDTHxHEIGHT"):
        parse_size(text)
    assert parse_size("3840x2160") == (3840, 2160)


def test_wrong_options_are_refused(file: Path) -> None:
    with pytest.raises(OptionError, match="network_g.num_feats"):
        prepare(file, ["network_g:num_feats=3"])
    with pytest.raises(OptionError, match="model_type: SRModel is BasicSR's own"):
        prepare(file, ["model_type=SRModel"])


@pytest.mark.parametrize("wrong", [["--tile", "0"], ["--tile", "16", "--overlap", "16"], ["--size", "big"]])
def test_wrong_arguments_are_refused_before_anything_is_measured(
    file: Path, wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_tiles.Run, "in_new_process", lambda *_: pytest.fail("was measured"))
    result = CliRunner().invoke(app, ["bench", "tiles", "-opt", str(file), *wrong])
    assert isinstance(result.exception, OptionError)


@pytest.mark.slow
def test_each_kind_is_measured_in_a_new_process(file: Path) -> None:
    arguments = ["--size", "48x32", "--tile", "16", "--overlap", "4", "--threads", "1"]
    result = CliRunner().invoke(app, ["bench", "tiles", "-opt", str(file), *arguments])
    assert result.exit_code == 0, result.output
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in result.output.splitlines() if "|" in line
    ]
    assert [row[:3] for row in rows[2:]] == [["16", "12", "16×16"], ["whole image", "1", "48×32"]]
