"""``kdsr bench data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.data.resize import imresize
from kdsr.prepare.pair_writer import write_lmdb
from kdsr.runtime.errors import OptionError
from kdsr.tools import bench_data

LOADERS = ["BasicSR, disk", "kdsr, disk", "kdsr, cache: ram", "kdsr, cache: ram, flips_on_device"]


@pytest.fixture
def file(run_options: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(run_options), encoding="utf-8")
    return str(path)


def measured(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "data", *arguments, "--repeat", "2", "--seconds", "0"])


def test_the_table_and_the_values(file: str, tmp_path: Path) -> None:
    out = {"--out": str(tmp_path / "new/table.md"), "--json": str(tmp_path / "new/values.json")}
    result = measured("-opt", file, "--workers", "1", *(part for pair in out.items() for part in pair))
    assert result.exit_code == 0, result.output
    values = json.loads(Path(out["--json"]).read_text())
    assert list(values["patches_per_second"]) == LOADERS
    assert all(len(rates) == 2 and min(rates) > 0 for rates in values["patches_per_second"].values())
    text = Path(out["--out"]).read_text(encoding="utf-8")
    assert text in result.output and "batch 2, 1 workers, 2 rounds" in text and "torch " in text
    assert [line.split("|")[1].strip() for line in text.splitlines()[4:]] == LOADERS
    assert "1.00–1.00" in text.splitlines()[4]


def test_sub_images_of_a_sample(tmp_path: Path) -> None:
    roots = bench_data.write_sub_images(tmp_path, 4)
    gt, lq = (
        {path.name: cv2.imread(str(path)) for path in Path(roots[f"dataroot_{key}"]).iterdir()}
        for key in ("gt", "lq")
    )
    assert gt.keys() == lq.keys() and len(gt) >= 24
    assert {image.shape for image in gt.values()} == {(480, 480, 3)}
    assert {image.shape for image in lq.values()} == {(120, 120, 3)}
    for name, image in gt.items():  # away from the border of the cut, beyond which resizing saw real pixels
        assert np.array_equal(imresize(image, 1 / 4)[4:-4, 4:-4], lq[name][4:-4, 4:-4])


def test_folders_in_place_of_the_options(file: str, photos: Path, tmp_path: Path) -> None:
    result = measured("-opt", file, "--dataroot_lq", str(photos / "LR_x2"), "--workers", "0")
    assert isinstance(result.exception, OptionError) and "do not match scale 4" in str(result.exception)
    flags = ["--dataroot_lq", str(photos / "LR_x2"), "--force_yml", "scale=2"]
    assert measured("-opt", file, *flags, "--workers", "0").exit_code == 0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_lmdbs(file: str, photos: Path, tmp_path: Path, workers: str) -> None:
    flags = []
    for key, folder, side in (("gt", "GT", 96), ("lq", "LR_x4", 24)):
        names = sorted(path.stem for path in (photos / folder).iterdir())
        write_lmdb(photos / folder, tmp_path / f"{key}.lmdb", dict.fromkeys(names, (side, side, 3)))
        flags += [f"--dataroot_{key}", str(tmp_path / f"{key}.lmdb")]
    result = measured("-opt", file, *flags, "--workers", workers)
    assert result.exit_code == 0, result.output
    assert "| BasicSR, LMDB " in result.output and "| kdsr, LMDB " in result.output


def test_files_that_are_not_there_and_other_sets(file: str, tmp_path: Path) -> None:
    result = measured("-opt", file, "--dataroot_gt", "nowhere")
    assert isinstance(result.exception, OptionError)
    assert "datasets.train.dataroot_gt: there is no folder nowhere (--sample: " in str(result.exception)
    result = measured("-opt", file, "--force_yml", "datasets:train:type=ImageFolderDataset")
    assert isinstance(result.exception, OptionError)
    assert "bench data compares sets of pairs" in str(result.exception)
