"""Whole runs with options that BasicSR reads otherwise than they say."""

from __future__ import annotations

import copy
import csv
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import basicsr.test
import cv2
import numpy as np
import pytest
import skimage.data
import torch
import yaml
from basicsr.archs import build_network
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from basicsr.utils.registry import METRIC_REGISTRY

from kdsr import test as test_entry
from kdsr.data.resize import imresize
from kdsr.pipeline import seam
from kdsr.pipeline.run_data import make_dataset
from kdsr.pipeline.session import Session, up_to_iteration
from small_runs import run

Options = dict[str, Any]
RUN = Path("experiments/run")


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def log_of_run() -> str:
    (log,) = RUN.glob("train_*.log")
    return log.read_text()


# -------------------------------------------------------------------------------------------------------- data


def test_the_y_channel_of_images_alone_is_that_of_pairs(photos: Path) -> None:
    """BasicSR's SingleImageDataset takes red for blue."""
    common = {"name": "photos", "io_backend": {"type": "disk"}, "color": "y", "phase": "val", "scale": 1}
    single = {**common, "type": "SingleImageDataset", "dataroot_lq": str(photos / "GT")}
    paired = {**single, "type": "PairedImageDataset", "dataroot_gt": str(photos / "GT")}
    with seam._replaced(basicsr.test, {}, Session([])):
        alone, pairs = (make_dataset("val", opt, 1) for opt in (single, paired))
        for index in range(len(pairs)):
            assert torch.equal(alone[index]["lq"], pairs[index]["lq"])
            red, green, blue = cv2.imread(pairs[index]["lq_path"])[..., ::-1].transpose(2, 0, 1) / 255
            luma = (65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255
            np.testing.assert_allclose(alone[index]["lq"][0].numpy(), luma, atol=1e-6)


def test_a_run_on_equal_names_in_folders_sees_the_same_images(run_options: Options) -> None:
    """BasicSR would look for one LQ image of that name, outside of the folders."""
    train = run_options["datasets"]["train"]
    assert run(run_options) == 0
    plain = re.findall(r"l_pix: (\S+)", log_of_run())
    shutil.rmtree("experiments")
    lines = []
    for key in ("dataroot_gt", "dataroot_lq"):
        for number, file in enumerate(sorted(Path(train[key]).iterdir())):
            target = Path(key, f"seq{number}", "0001.png")
            target.parent.mkdir(parents=True)
            shutil.copy(file, target)
            lines.append(f"seq{number}/0001.png (96,96,3)\n")
        train[key] = key
    Path("list.txt").write_text("".join(lines[:4]))
    train["meta_info_file"] = "list.txt"
    assert run(run_options) == 0
    assert re.findall(r"l_pix: (\S+)", log_of_run()) == plain != []


def test_a_list_beside_an_lmdb_is_what_the_run_trains_on(run_options: Options) -> None:
    train = run_options["datasets"]["train"]
    for key in ("dataroot_gt", "dataroot_lq"):
        names = sorted(path.name for path in Path(train[key]).iterdir())
        make_lmdb_from_imgs(train[key], f"{key}.lmdb", names, [name[:-4] for name in names])
        train[key] = f"{key}.lmdb"
    train.update(io_backend={"type": "lmdb"}, meta_info_file="list.txt")
    Path("list.txt").write_text("cat.png (96,96,3)\nrocket.png (96,96,3)\n")
    run_options["train"]["total_iter"] = 1
    assert run(run_options) == 0
    assert "Number of train images: 2" in log_of_run()


@pytest.mark.parametrize("listing", ["null", "~/list.txt"])
def test_images_alone_with_a_list_or_none(
    run_options: Options, listing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """BasicSR's SingleImageDataset opens null; and of paths only the roots knew the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("list.txt").write_text("cat.png\n")
    lq = run_options["datasets"]["val"]["dataroot_lq"]
    run_options["datasets"] = {
        "test": {
            "name": "alone", "type": "SingleImageDataset", "dataroot_lq": lq, "io_backend": {"type": "disk"},
            "meta_info_file": yaml.safe_load(listing),
        }
    }  # fmt: skip
    torch.save({"params": build_network(copy.deepcopy(run_options["network_g"])).state_dict()}, "net.pth")
    run_options["path"]["pretrain_network_g"] = "net.pth"
    run_options["val"] = {"save_img": True}
    Path("test.yml").write_text(yaml.safe_dump(run_options))
    assert test_entry.main(["-opt", "test.yml"]) == 0
    images = sorted(path.name for path in Path("results/run/visualization/alone").iterdir())
    assert images == (["cat_run.png"] if listing != "null" else [f"{name}_run.png" for name in sorted(
        path.stem for path in Path(lq).iterdir())])  # fmt: skip


# -------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("model", ["SRModel", "KDModel"])
@pytest.mark.parametrize("val_freq", [1, 2, 100])
def test_the_last_validation_has_the_iteration_that_was_made(
    run_options: Options, model: str, val_freq: int
) -> None:
    """And a line of BasicSR's on several sets, which is not true, is not in the log."""
    run_options["model_type"] = model
    run_options["datasets"]["val_2"] = {**copy.deepcopy(run_options["datasets"]["val"]), "name": "again"}
    ours = model == "KDModel"  # BasicSR's would write the images of both sets to one place
    run_options["val"].update(val_freq=val_freq, save_img=ours)
    assert run(run_options) == 0
    log = log_of_run()
    made = {iteration for iteration in (1, 2) if iteration % val_freq == 0} | {3}
    assert {int(number) for number in re.findall(r"Best: \S+ @ (\d+) iter", log)} <= made
    saved = {int(path.stem.rpartition("_")[2]) for path in (RUN / "visualization").rglob("*.png")}
    assert saved == (made if ours else set())
    assert "Multiple validation datasets" not in log
    assert log.count("Validation again") >= len(made)
    assert not logging.getLogger("basicsr").filters


def test_validations_of_a_run_that_was_longer_before_keep_their_iteration() -> None:
    seen: list[Any] = []
    validation = up_to_iteration(5, lambda *given, **more: seen.append((given, more)))
    for iteration in (3, 5, 6):
        validation("loader", iteration, None, save_img=False)
    assert [given[1] for given, _ in seen] == [3, 5, 5]
    assert all(more == {"save_img": False} for _, more in seen)


def values_of_metric(name: str) -> dict[int, float]:
    """Mean of a metric over the images, by iteration."""
    rows: dict[int, list[float]] = {}
    with (RUN / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row["metric"] == name and row["network"] == "student":
                rows.setdefault(int(row["iteration"]), []).append(float(row["value"]))
    return {iteration: sum(values) / len(values) for iteration, values in rows.items()}


def ruined_at_the_end(run_options: Options) -> Options:
    run_options["val"]["val_freq"] = 1
    run_options["train"].update(total_iter=4, ema_decay=0)
    run_options["train"]["scheduler"] = {"type": "MultiStepLR", "milestones": [3], "gamma": 3000.0}
    return run_options


def test_the_best_by_niqe_is_the_lowest(run_options: Options) -> None:
    """Of an image of four of its blocks."""
    image = np.ascontiguousarray(skimage.data.astronaut()[:192, 100:292, ::-1])
    for folder, pixels in (("GT", image), ("LQ", imresize(image, 1 / 4))):
        Path(folder).mkdir()
        cv2.imwrite(f"{folder}/a.png", pixels)
    options = ruined_at_the_end(run_options)
    options["datasets"]["val"].update(dataroot_gt="GT", dataroot_lq="LQ")
    options["val"]["metrics"] = {"niqe": {"type": "calculate_niqe", "crop_border": 0}}
    options["logger"]["save_best"] = {"set": "held_out", "metric": "niqe"}
    assert run(options) == 0
    values = values_of_metric("niqe")
    assert min(values.values()) < max(values.values())
    measured = torch.load(RUN / "models/net_g_best.pth", weights_only=True)["measured"]
    assert measured["value"] == pytest.approx(min(values.values()))
    lowest = min(values.values())
    assert f"Best: {lowest:.4f} @ {measured['iteration']} iter" in log_of_run()


@pytest.mark.parametrize("model", ["SRModel", "KDModel"])
@pytest.mark.parametrize("declared_in", ["options", "function"])
def test_the_best_by_a_metric_of_ones_own(run_options: Options, model: str, declared_in: str) -> None:
    """It takes no argument ``better``, which BasicSR passes on to it."""

    def my_error(img: np.ndarray, img2: np.ndarray) -> float:
        return float(np.abs(img.astype(float) - img2).mean())

    options = ruined_at_the_end(run_options)
    options["model_type"] = model
    options["val"]["metrics"] = {"error": {"type": "my_error"}}
    if declared_in == "options":
        options["val"]["metrics"]["error"]["better"] = "lower"
    else:
        my_error.better = "lower"  # type: ignore[attr-defined]
    METRIC_REGISTRY._obj_map["my_error"] = my_error
    try:
        assert run(options) == 0
    finally:
        del METRIC_REGISTRY._obj_map["my_error"]
    found = re.findall(r"# error: (\S+)[^\t]*\tBest: (\S+) @ (\d+) iter", log_of_run())
    values = [float(value) for value, _, _ in found]
    assert values[-1] > values[0]  # ruined
    assert float(found[-1][1]) == min(values)
