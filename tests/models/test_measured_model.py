"""How ``val`` has images restored: whole, in tiles, by the mean of eight views; by student, EMA and teacher alike."""

from __future__ import annotations

import contextlib
import copy
import csv
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.archs.edsr_arch import EDSR
from basicsr.utils.lmdb_util import LmdbMaker
from torch.nn.modules.module import register_module_forward_pre_hook

from kdsr import test as test_entry
from kdsr import train as train_entry
from kdsr.models.kd_model import KDModel
from kdsr.models.self_ensemble import self_ensemble
from small_runs import run

TILES = {"tile": 18, "tile_overlap": 12}  # of the 24×24 LQ photographs; EDSR with one block reaches 6 pixels


@pytest.fixture
def seen() -> Iterator[list[tuple[int, int]]]:
    """The sizes that an EDSR is shown for validation or a test: all but the patches of 16×16."""
    sizes: list[tuple[int, int]] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, EDSR) and inputs[0].shape[-2:] != (16, 16):
            sizes.append(tuple(inputs[0].shape[-2:]))

    handle = register_module_forward_pre_hook(note)
    yield sizes
    handle.remove()


def make(options: dict[str, Any], is_train: bool, **val: Any) -> KDModel:
    options = copy.deepcopy(options) | {"num_gpu": 0, "dist": False, "rank": 0, "world_size": 1}
    options["val"].update(val)
    torch.manual_seed(0)
    return KDModel(options | {"is_train": is_train})


@pytest.mark.parametrize("ema", [0, 0.9])
@torch.no_grad()
def test_tiles_and_ensemble_of_student_or_ema(run_options: dict[str, Any], ema: float) -> None:
    """The EMA is what is validated where there is one; both come back to the mode that they were in."""
    run_options["train"]["ema_decay"] = ema
    model = make(run_options, True, **TILES, self_ensemble=True)
    if ema:
        for weight in model.net_g_ema.parameters():
            weight.mul_(0.9)
    tested = copy.deepcopy(model.net_g_ema if ema else model.net_g).eval()
    lq = torch.rand(1, 3, 40, 29)
    torch.testing.assert_close(model.restore(lq), self_ensemble(tested)(lq), rtol=0, atol=1e-4)
    model.opt["val"]["self_ensemble"] = False
    torch.testing.assert_close(model.restore(lq), tested(lq), rtol=0, atol=1e-4)
    assert (self_ensemble(tested)(lq) - tested(lq)).abs().max() > 1e-3
    assert model.net_g.training and not tested.training


def measured(name: str) -> dict[tuple[str, str], float]:
    (file,) = Path().glob(f"*/{name}/metrics.csv")
    with file.open(newline="", encoding="utf-8") as rows:
        return {(row["network"], row["image"]): float(row["value"]) for row in csv.DictReader(rows)}


def run_test(options: dict[str, Any], **val: Any) -> dict[str, np.ndarray]:
    """A test as on the command line; gives the saved images."""
    options = copy.deepcopy(options)
    options["val"].update(val)
    Path("test.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert test_entry.main(["-opt", "test.yml"]) == 0
    images = Path("results", options["name"], "visualization", "held_out").iterdir()
    return {path.name.split("_")[0]: cv2.imread(str(path)).astype(int) for path in images}


@pytest.fixture
def test_options(
    run_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    torch.save({"params": build_network(run_options["network_g"]).state_dict()}, "student.pth")
    run_options["datasets"] = {"test_1": run_options["datasets"]["val"]}
    run_options["path"] = {"pretrain_network_g": "student.pth"}
    run_options["val"].update(save_img=True)
    return {key: value for key, value in run_options.items() if key not in ("train", "logger")}


def test_a_test_in_tiles_gives_the_images_and_values_of_one_without(
    test_options: dict[str, Any], seen: list[tuple[int, int]]
) -> None:
    whole = run_test({**test_options, "name": "whole"})
    assert set(seen) == {(24, 24)}
    seen.clear()
    tiles = run_test({**test_options, "name": "tiles"}, **TILES)
    assert seen == [(18, 18)] * 4 * 4
    assert len(whole) == 4 and set(tiles) == set(whole)
    assert all(np.abs(tiles[name] - whole[name]).max() <= 1 for name in whole)  # a grey level: rounding
    assert measured("tiles") == pytest.approx(measured("whole"), abs=1e-2)


def test_a_test_of_eight_views(test_options: dict[str, Any], seen: list[tuple[int, int]]) -> None:
    plain = run_test({**test_options, "name": "plain"})
    seen.clear()
    views = run_test({**test_options, "name": "views"}, self_ensemble=True)
    assert seen == [(24, 24)] * 8 * 4
    assert all(np.abs(views[name] - plain[name]).max() > 1 for name in plain)
    seen.clear()
    both = run_test({**test_options, "name": "both"}, self_ensemble=True, **TILES)
    assert seen == [(18, 18)] * 8 * 4 * 4
    assert all(np.abs(views[name] - both[name]).max() <= 1 for name in plain)


def test_validation_in_tiles_shows_no_network_more(
    dckd_options: dict[str, Any], seen: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher before the training, student after it; their values are those of whole images."""
    monkeypatch.chdir(tmp_path)
    values = {}
    for name, tiles in (
        ("whole", {}),
        ("tiles", {"tile": 22, "tile_overlap": 16}),
    ):  # the teacher reaches 8 pixels
        seen.clear()
        dckd_options["name"] = name
        dckd_options["val"].update(teacher=True, **tiles)
        Path("run.yml").write_text(yaml.safe_dump(dckd_options), encoding="utf-8")
        assert train_entry.main(["-opt", "run.yml"]) == 0
        assert set(seen) == ({(22, 22)} if tiles else {(24, 24)})
        values[name] = measured(name)
    assert {network for network, _ in values["tiles"]} == {"teacher", "student"}
    assert values["tiles"] == pytest.approx(values["whole"], abs=1e-2)


def tree_of(photos: Path, place: Path, folders: tuple[str, ...]) -> list[str]:
    """The LQ photographs in folders of equal names; gives the names that their results must have."""
    files = sorted((photos / "LR_x4").iterdir())
    for folder, file in itertools.product(folders, files):
        (place / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / folder / file.name)
    return [f"{folder}/{file.stem}" for folder in sorted(folders) for file in files]


def test_images_of_one_name_in_several_folders(test_options: dict[str, Any], photos: Path) -> None:
    names = tree_of(photos, Path("tree"), ("seq 1", "seq 2/ä", "seq 2/b.c"))
    Path("tree", "seq 3").symlink_to(Path("tree", "seq 1").resolve())
    names += [name.replace("seq 1", "seq 3") for name in names if name.startswith("seq 1")]
    test_options["datasets"] = {
        "test_1": {
            "name": "tree",
            "type": "LQImageDataset",
            "dataroot_lq": "tree",
            "io_backend": {"type": "disk"},
        }
    }
    test_options["val"].pop("metrics")
    Path("test.yml").write_text(yaml.safe_dump({**test_options, "name": "nested"}), encoding="utf-8")
    assert test_entry.main(["-opt", "test.yml"]) == 0
    folder = Path("results/nested/visualization/tree")
    saved = {str(file.relative_to(folder)) for file in folder.rglob("*.png")}
    assert saved == {f"{name}_nested.png" for name in names}


def test_keys_of_an_lmdb_with_folders(test_options: dict[str, Any], photos: Path) -> None:
    names = []
    for role in ("GT", "LR_x4"):
        maker = LmdbMaker(f"{role}.lmdb", map_size=2**24)
        for folder, file in itertools.product(("seq1", "seq2"), sorted((photos / role).iterdir())):
            maker.put(file.read_bytes(), f"{folder}/{file.stem}", cv2.imread(str(file)).shape)
            names.append(f"{folder}/{file.stem}")
        maker.close()
    test_options["datasets"]["test_1"].update(
        dataroot_gt="GT.lmdb", dataroot_lq="LR_x4.lmdb", io_backend={"type": "lmdb"}
    )
    Path("test.yml").write_text(yaml.safe_dump({**test_options, "name": "keys"}), encoding="utf-8")
    assert test_entry.main(["-opt", "test.yml"]) == 0
    assert {image for _, image in measured("keys")} == set(names)
    folder = Path("results/keys/visualization/held_out")
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.png")} == {
        f"{name}_keys.png" for name in names
    }


@pytest.mark.parametrize("model", ["KDModel", "SRModel"])
def test_results_of_one_name_are_refused_before_the_run(
    test_options: dict[str, Any], photos: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    """BasicSR's own model names results by the file alone: there the folders do not tell them apart."""
    tree_of(photos, Path("tree"), ("seq1", "seq2") if model == "SRModel" else ("seq1",))
    first = sorted(Path("tree", "seq1").iterdir())[0]
    second = Path("tree", "seq2", first.name) if model == "SRModel" else first.with_suffix(".jpg")
    if model == "KDModel":
        shutil.copy(first, second)
    test_options["datasets"] = {
        "test_1": {
            "name": "tree",
            "type": "LQImageDataset",
            "dataroot_lq": "tree",
            "io_backend": {"type": "disk"},
        }
    }
    test_options["val"].pop("metrics")
    Path("test.yml").write_text(yaml.safe_dump({**test_options, "model_type": model}), encoding="utf-8")
    assert test_entry.main(["-opt", "test.yml"]) == 2
    message = capsys.readouterr().err
    assert "datasets.test_1" in message and str(first) in message and str(second) in message
    assert not Path("results").exists()


def test_sets_of_equal_images_in_training_of_basicsrs_model(
    run_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It saves the images of all sets in one folder; without saved images there is nothing to tell apart."""
    run_options["datasets"]["val_2"] = {**run_options["datasets"]["val"], "name": "again"}
    run_options["train"]["total_iter"] = 1
    run_options["model_type"] = "SRModel"
    with contextlib.chdir(tmp_path):
        run_options["val"].update(save_img=True)
        assert run(run_options) == 2
        assert "results of both would be called" in capsys.readouterr().err
        run_options["val"].update(save_img=False)
        assert run(run_options) == 0


def test_sets_of_equal_images_in_training(run_options: dict[str, Any], tmp_path: Path, photos: Path) -> None:
    run_options["datasets"]["val_2"] = {**run_options["datasets"]["val"], "name": "again"}
    run_options["train"]["total_iter"] = 1
    run_options["val"].update(save_img=True, val_freq=1)
    with contextlib.chdir(tmp_path):
        assert run(run_options) == 0
        folder = Path("experiments/run/visualization")
        names = [file.stem for file in (photos / "GT").iterdir()]
        assert {str(file.relative_to(folder)) for file in folder.rglob("*.png")} == {
            f"{dataset}/{name}/{name}_1.png" for dataset in ("held_out", "again") for name in names
        }


@pytest.mark.parametrize("name", ["a/b", "..", "", "/tmp/x"])
def test_names_of_sets_are_names_of_folders(
    test_options: dict[str, Any], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    test_options["datasets"]["test_1"]["name"] = name
    Path("test.yml").write_text(yaml.safe_dump(test_options), encoding="utf-8")
    assert test_entry.main(["-opt", "test.yml"]) == 2
    assert f"datasets.test_1.name: {name!r} must be" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["PairedImageDataset", "SingleImageDataset"])
def test_16_bits_reach_the_network(test_options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    shown: list[torch.Tensor] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, EDSR) and inputs[0].shape[-2:] == (24, 28):
            shown.append(inputs[0])

    values = np.arange(24 * 28 * 3, dtype=np.uint16).reshape(
        24, 28, 3
    )  # all of them black in 8 bits, or nearly
    for folder, image in (("LQ", values), ("GT", np.zeros((96, 112, 3), np.uint16))):
        Path(folder).mkdir()
        cv2.imwrite(f"{folder}/deep.png", image)
    opt = {"name": "deep", "type": kind, "dataroot_lq": "LQ", "io_backend": {"type": "disk"}}
    if kind == "PairedImageDataset":
        opt["dataroot_gt"] = "GT"
    else:
        test_options["val"].pop("metrics")
    test_options["datasets"] = {"test_1": opt}
    Path("test.yml").write_text(yaml.safe_dump(test_options), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(note).remove)
        assert test_entry.main(["-opt", "test.yml"]) == 0
    expected = torch.from_numpy(values[..., ::-1].astype(np.float32) / 65535).permute(2, 0, 1)[None]
    assert any(torch.equal(image, expected) for image in shown)
    (log,) = Path("results", test_options["name"]).glob("*.log")
    assert log.read_text().count("dataroot_lq: 1 image has more than 8 bits per channel") == 1
