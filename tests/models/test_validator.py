"""How ``val`` has images restored: whole, in tiles, by the mean of eight views; by student, EMA and teacher alike."""

from __future__ import annotations

import contextlib
import copy
import csv
import itertools
import re
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
from kdsr.models import evaluation
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
    assert seen == [(18, 18)] * 4 * 5  # one image is rehearsed
    assert len(whole) == 4 and set(tiles) == set(whole)
    assert all(np.abs(tiles[name] - whole[name]).max() <= 1 for name in whole)  # a grey level: rounding
    assert measured("tiles") == pytest.approx(measured("whole"), abs=1e-2)


def test_a_test_of_eight_views(test_options: dict[str, Any], seen: list[tuple[int, int]]) -> None:
    plain = run_test({**test_options, "name": "plain"})
    seen.clear()
    views = run_test({**test_options, "name": "views"}, self_ensemble=True)
    assert seen == [(24, 24)] * 8 * 5
    assert all(np.abs(views[name] - plain[name]).max() > 1 for name in plain)
    seen.clear()
    both = run_test({**test_options, "name": "both"}, self_ensemble=True, **TILES)
    assert seen == [(18, 18)] * 8 * 4 * 5
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
    assert {network for network, _ in values["tiles"]} == {"baseline", "teacher", "student"}
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
    assert (
        f"datasets.test_1.name: {name!r} becomes part of the name of a file or folder"
        in capsys.readouterr().err
    )


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


# ------------------------------------------------------------------------------------------------------- baselines


def rows(name: str) -> list[dict[str, str]]:
    with open(f"experiments/{name}/metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def train(options: dict[str, Any], *words: str) -> str:
    """Trains; gives the newest log."""
    Path("run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml", *words]) == 0
    logs = Path(f"experiments/{options['name']}").glob("train_*.log")
    return max(logs, key=lambda path: path.stat().st_mtime_ns).read_text("utf-8")


def images_read_for_a_baseline(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = evaluation.baseline_image
    monkeypatch.setattr(
        evaluation, "baseline_image", lambda lq, scale: (calls.append(scale), original(lq, scale))[1]
    )
    return calls


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_baseline_is_measured_once_and_logged_beside_every_validation(
    teacher_options: dict[str, Any], with_teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sets, three validations, one of them after a resume."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = teacher_options
    options["datasets"]["val_2"] = {**options["datasets"]["val"], "name": "again"}
    options["val"].update(val_freq=1, teacher=with_teacher)
    options["logger"].update(save_checkpoint_freq=1, use_tb_logger=True)
    options["train"]["total_iter"] = 2
    calls = images_read_for_a_baseline(monkeypatch)
    rehearsed = 2  # the teacher's rehearsal of one image of each set
    log = train(options)
    assert len(calls) == rehearsed + 8
    found = rows("run")
    of_baseline = [row for row in found if row["network"] == "baseline"]
    assert [(row["iteration"], row["image"]) for row in of_baseline] == [
        ("0", image) for _ in range(2) for image in ("astronaut", "cat", "coffee", "rocket")
    ]
    mean = np.mean([float(row["value"]) for row in of_baseline if row["set"] == "again"])
    assert len(re.findall(rf"# psnr: \d+\.\d+ \(bicubic {mean:.4f}\)", log)) == 2 * (2 + with_teacher)
    events = EventAccumulator("tb_logger/run")
    events.Reload()
    assert [event.value for event in events.Scalars("baseline/again/psnr")] == pytest.approx([mean] * 2)

    options["train"]["total_iter"] = 3
    log = train(options, "--auto_resume")
    assert len(calls) == 2 * rehearsed + 8  # read from metrics.csv
    assert rows("run")[: len(found)] == found
    assert [row["network"] for row in rows("run")[len(found) :]] == ["student"] * 8
    assert f"(bicubic {mean:.4f})" in log


def test_a_new_metric_gets_its_baseline_at_a_resume(
    teacher_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = teacher_options
    options["logger"]["save_checkpoint_freq"] = 1
    options["train"]["total_iter"] = 1
    train(options)
    options["val"]["metrics"]["ssim"] = {"type": "calculate_ssim", "crop_border": 4}
    options["train"]["total_iter"] = 2
    train(options, "--auto_resume")
    kinds = [(row["network"], row["metric"]) for row in rows("run")]
    assert kinds.count(("baseline", "psnr")) == kinds.count(("baseline", "ssim")) == 4


@pytest.mark.parametrize("scale", [1, 4])
def test_a_test_logs_the_baseline_and_keeps_its_file_to_the_network(
    test_options: dict[str, Any], photos: Path, scale: int
) -> None:
    if scale == 1:
        test_options.update(
            scale=1, network_g={"type": "PReNet", "num_feat": 4, "recurrent_iter": 1, "num_block": 1}
        )
        folder = Path("blurred")
        folder.mkdir()
        for path in (photos / "GT").iterdir():
            cv2.imwrite(str(folder / path.name), cv2.blur(cv2.imread(str(path)), (3, 3)))
        test_options["datasets"]["test_1"]["dataroot_lq"] = str(folder)
        torch.save({"params": build_network(dict(test_options["network_g"])).state_dict()}, "student.pth")
    Path("test.yml").write_text(yaml.safe_dump(test_options), encoding="utf-8")
    assert test_entry.main(["-opt", "test.yml"]) == 0
    (log,) = Path("results/run").glob("*.log")
    name = "input" if scale == 1 else "bicubic"
    assert re.search(rf"# psnr: \d+\.\d+ \({name} \d\d\.\d+\)", log.read_text("utf-8"))
    assert {network for network, _ in measured("run")} == {"student"}


def test_a_student_whose_output_is_not_finite_ends_the_run_with_the_images_name(
    run_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The step is finite; the weights that it leaves are too large for an image. No best is kept of it."""
    monkeypatch.chdir(tmp_path)
    run_options["train"].update(optim_g={"type": "Adam", "lr": 1e30}, ema_decay=0)
    run_options["val"]["val_freq"] = 1
    run_options["logger"]["save_best"] = {"set": "held_out", "metric": "psnr"}
    Path("run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "astronaut.png: the output of the student is not finite" in last
    assert not list(Path("experiments/run").rglob("metrics.csv")) + list(Path().rglob("net_g_best.pth"))
