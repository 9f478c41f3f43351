"""``kdsr data degrade``: every task, up to pairs that BasicSR reads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from basicsr.data import build_dataset
from typer.testing import CliRunner

from kdsr.cli import app
from kdsr.data.checks import check_dataset
from kdsr.prepare.degrade import OPTIONS_OF, TASKS, build
from kdsr.prepare.synthesis import Seeded
from kdsr.prepare.synthetic_noise import Noise
from kdsr.prepare.synthetic_rain import Rain
from kdsr.runtime.errors import DataError, OptionError

QUICK: dict[str, list[object]] = {  # kernels that fit into the photographs here
    "rain": [],
    "blur": ["--size", "3,9"],
    "haze": [],
    "noise": [],
}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["data", "degrade", *(str(argument) for argument in arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def files(folder: Path) -> dict[str, bytes]:
    """The content of a folder, without LMDB's lock files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock.mdb"
    }


def drawn(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "parameters.jsonl").read_text().splitlines()]


def paired(root: Path, gt: str, lq: str) -> dict[str, Any]:
    backend = "lmdb" if gt.endswith(".lmdb") else "disk"
    return {
        "name": "made", "type": "PairedImageDataset", "dataroot_gt": str(root / gt),
        "dataroot_lq": str(root / lq), "io_backend": {"type": backend}, "phase": "train", "scale": 1,
        "gt_size": 32, "use_hflip": True, "use_rot": True,
    }  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three photographs, one of them grey and in a subfolder, one smaller than the others."""
    root = tmp_path / "clean"
    (root / "more").mkdir(parents=True)
    cv2.imwrite(str(root / "cat.png"), skimage.data.chelsea()[80:151, 120:213, ::-1])
    cv2.imwrite(str(root / "more" / "camera.png"), skimage.data.camera()[100:164, 200:264])
    cv2.imwrite(str(root / "cup.jpg"), skimage.data.coffee()[150:190, 250:310, ::-1])
    return root


@pytest.mark.parametrize("task", TASKS)
def test_every_task_makes_pairs(source: Path, tmp_path: Path, task: str) -> None:
    out = tmp_path / "out"
    output = run(source, out, "--task", task, "--lmdb", "--workers", 1, *QUICK[task])
    assert "3 pairs of 3 images in GT, LQ, GT.lmdb, LQ.lmdb" in output and "parameters.jsonl" in output
    assert sorted(path.name for path in out.iterdir()) == [
        "GT", "GT.lmdb", "LQ", "LQ.lmdb", "parameters.jsonl", "settings.json"]  # fmt: skip
    for name in ("cat", "camera"):
        original = cv2.imread(str(next(source.rglob(f"{name}.png"))), cv2.IMREAD_UNCHANGED)
        gt, lq = (cv2.imread(str(out / folder / f"{name}.png"), -1) for folder in ("GT", "LQ"))
        np.testing.assert_array_equal(gt, original)
        assert lq.shape == gt.shape and lq.dtype == np.uint8 and (lq != gt).any()
    assert [(entry["name"], entry["task"], entry["seed"]) for entry in drawn(out)] == [
        ("camera", task, 0), ("cat", task, 0), ("cup", task, 0)]  # fmt: skip
    settings = json.loads((out / "settings.json").read_text())
    assert settings["task"] == task and set(settings) - {"task", "seed"} == set(OPTIONS_OF[task])
    for ending in ("", ".lmdb"):
        opt = paired(out, f"GT{ending}", f"LQ{ending}")
        assert check_dataset(opt, 1) == []
        dataset = build_dataset(opt)
        assert len(dataset) == 3 and dataset[0]["lq"].shape == dataset[0]["gt"].shape == (3, 32, 32)


@pytest.mark.parametrize("task", TASKS)
def test_workers_and_other_images_do_not_matter(source: Path, tmp_path: Path, task: str) -> None:
    arguments = ["--task", task, "--seed", 7, *QUICK[task]]
    for workers in (1, 2):
        run(source, tmp_path / str(workers), "--lmdb", "--workers", workers, *arguments)
    one, two = (files(tmp_path / str(workers)) for workers in (1, 2))
    assert one == two and "LQ.lmdb/data.mdb" in one
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(source / "cat.png", alone)
    run(alone, tmp_path / "single", *arguments)
    assert files(tmp_path / "single")["LQ/cat.png"] == one["LQ/cat.png"]
    assert drawn(tmp_path / "single") == [entry for entry in drawn(tmp_path / "1") if entry["name"] == "cat"]
    run(source, tmp_path / "other", "--task", task, *QUICK[task])  # another seed
    assert files(tmp_path / "other")["LQ/cat.png"] != one["LQ/cat.png"]


def test_the_command_does_what_the_functions_do(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", "--task", "rain", "--angle", "-20,-10", "--seed", 4, "--layers", 2)
    cat = cv2.imread(str(source / "cat.png"))
    expected, parameters = Seeded(Rain(angle=(-20, -10), layers=2), 4)("cat", cat)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out" / "LQ" / "cat.png")), expected)
    assert drawn(tmp_path / "out")[1] == {"name": "cat", **parameters}
    assert all(-20 <= entry["angle"] <= -10 for entry in drawn(tmp_path / "out"))


def test_a_fixed_sigma_and_a_range(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "fixed", "--task", "noise", "--sigma", 50)
    assert [entry["sigma"] for entry in drawn(tmp_path / "fixed")] == [50, 50, 50]
    run(source, tmp_path / "range", "--task", "noise", "--sigma", "10, 50")
    sigmas = [entry["sigma"] for entry in drawn(tmp_path / "range")]
    assert len(set(sigmas)) == 3 and min(sigmas) >= 10 and max(sigmas) <= 50


def test_sub_images_are_parts_of_the_degraded_photograph(source: Path, tmp_path: Path) -> None:
    arguments = ["--task", "haze", "--min-size", 64, "--gt", "target", "--lq", "input"]
    assert "left out 1 images below 64 pixels: cup" in run(source, tmp_path / "whole", *arguments)
    run(source, tmp_path / "cut", *arguments, "--crop", 48, "--step", 16, "--thresh", 13)
    assert drawn(tmp_path / "cut") == drawn(tmp_path / "whole") and len(drawn(tmp_path / "cut")) == 2
    for folder in ("target", "input"):
        whole = cv2.imread(str(tmp_path / "whole" / folder / "cat.png"))  # 71x93
        pieces = sorted((tmp_path / "cut" / folder).glob("cat_s*.png"))
        assert [piece.name for piece in pieces] == [f"cat_s{number:03d}.png" for number in range(1, 7)]
        for number, piece in enumerate(pieces):
            top, left = 16 * (number // 3), 16 * (number % 3)
            np.testing.assert_array_equal(cv2.imread(str(piece)), whole[top : top + 48, left : left + 48])


def test_odd_sizes_stay_whole(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", "--task", "noise", "--crop", 47)  # half of it is the step
    assert cv2.imread(str(tmp_path / "out" / "GT" / "cat_s001.png")).shape == (47, 47, 3)
    assert cv2.imread(str(tmp_path / "out" / "LQ" / "cup_s002.png")).shape == (40, 47, 3)


def test_measured_kernels(source: Path, tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    line = np.zeros((5, 5), np.uint8)
    line[2] = 51
    cv2.imwrite(str(kernels / "line.png"), line)
    np.save(tmp_path / "point.npy", np.ones((1, 1)))
    out = tmp_path / "out"
    run(source, out, "--task", "blur", "--kernels", kernels, "--kernels", tmp_path / "point.npy")
    assert {Path(entry["kernel"]).name for entry in drawn(out)} <= {"line.png", "point.npy"}
    run(source, out, "--task", "blur", "--kernels", kernels, "--force")
    gt, lq = (cv2.imread(str(out / folder / "cat.png")).astype(float) for folder in ("GT", "LQ"))
    means = np.mean([gt[:, start : start + gt.shape[1] - 4] for start in range(5)], axis=0)
    np.testing.assert_allclose(lq[:, 2:-2], means, atol=0.51)
    run(source, tmp_path / "turned", "--task", "blur", "--kernels", kernels, "--turn", "--linear-light")
    assert all({"quarter_turns", "mirrored"} <= set(entry) for entry in drawn(tmp_path / "turned"))


def test_depth_maps(source: Path, tmp_path: Path) -> None:
    depth = tmp_path / "depth"
    depth.mkdir()
    for path in [*source.glob("c*"), *source.glob("more/*")]:
        shape = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).shape
        ramp = np.tile(np.linspace(0, 65535, shape[1]), (shape[0], 1))
        cv2.imwrite(str(depth / f"{path.stem}.png"), ramp.astype(np.uint16))
    run(source, tmp_path / "out", "--task", "haze", "--depth", depth, "--airlight", 1, "--tint", 0)
    gt, lq = (cv2.imread(str(tmp_path / "out" / name / "cat.png")).astype(int) for name in ("GT", "LQ"))
    np.testing.assert_array_equal(lq[:, 0], gt[:, 0])
    assert (lq[:, -1] - gt[:, -1]).mean() > 30
    (depth / "cat.png").unlink()
    with pytest.raises(DataError, match="1 images have no depth map of the same name: cat"):
        run(source, tmp_path / "out2", "--task", "haze", "--depth", depth)
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--task", "rian"], "--task 'rian': did you mean rain"),
    (["--task", "fog"], "--task 'fog': valid: blur, haze, noise, rain"),
    (["--task", "noise", "--angle", "3", "--linear-light"], "--angle, --linear-light: not an option of --task noise"),
    (["--task", "noise", "--sigma", "30,20"], "--sigma 30,20: the range is reversed; give 20,30"),
    (["--task", "noise", "--sigma", "-1"], "--sigma -1: must not be below 0"),
    (["--task", "noise", "--sigma", "1,2,3"], "--sigma '1,2,3': give a number, or two"),
    (["--task", "noise", "--sigma", "many"], "--sigma 'many': give a number"),
    (["--task", "noise", "--sigma", "nan"], "--sigma nan,nan: give finite numbers"),
    (["--task", "rain", "--angle", "-100,0"], "--angle -100,0: must not be below -90"),
    (["--task", "rain", "--layers", "0"], "--layers 0: must not be below 1"),
    (["--task", "haze", "--tint", "-0.1"], "--tint -0.1: must not be below 0"),
    (["--task", "blur", "--turn"], "--turn: only for measured kernels"),
    (["--task", "haze", "--gradient", "1", "--depth", "."], "--gradient: only for random depth"),
    (["--task", "blur", "--size", "9", "--kernels", "."], "--size: only for camera shakes"),
    (["--task", "rain", "--crop", "-1"], "crop -1"),
    (["--task", "rain", "--gt", "a", "--lq", "a"], "--gt and --lq are both 'a'"),
    (["--task", "rain", "--lq", "../a"], r"--lq '../a': give the plain name"),
    (["--task", "rain", "--gt", "."], r"--gt '.': give the plain name"),
    (["--task", "rain", "--gt", "settings.json"], r"--gt 'settings.json': give the plain name"),
])  # fmt: skip
def test_wrong_arguments(source: Path, tmp_path: Path, arguments: list[object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run(source, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_wrong_kernels_and_depth(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--kernels: there is no kernel in .*empty"):
        run(source, tmp_path / "out", "--task", "blur", "--kernels", tmp_path / "empty")
    with pytest.raises(DataError, match="There is no depth map in .*empty"):
        run(source, tmp_path / "out", "--task", "haze", "--depth", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_images_smaller_than_the_kernel(source: Path, tmp_path: Path, workers: int) -> None:
    out, arguments = tmp_path / "out", ["--task", "blur", "--size", 50, "--shake", 0, "--workers", workers]
    with pytest.raises(DataError, match=r"cup: 60x40 pixels are too few for a kernel of \d+; .*--min-size"):
        run(source, out, *arguments)
    assert list(out.iterdir()) == []
    assert "2 pairs of 2 images" in run(source, out, *arguments, "--min-size", 60)


@pytest.mark.parametrize(("image", "message"), [
    (np.zeros((40, 40, 3), np.uint16), "has 16 bits per channel"),
    (np.zeros((40, 40, 4), np.uint8), "is partly transparent"),
])  # fmt: skip
def test_unsupported_images_are_named(source: Path, tmp_path: Path, image: np.ndarray, message: str) -> None:
    cv2.imwrite(str(source / "bad.png"), image)
    with pytest.raises(DataError, match=f"bad.png {message}"):
        run(source, tmp_path / "out", "--task", "noise")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("existing", ["GT/mine.txt", "LQ/mine.txt", "parameters.jsonl", "settings.json"])
def test_existing_output_needs_force(source: Path, tmp_path: Path, existing: str) -> None:
    mine = tmp_path / "out" / existing
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(OptionError, match="exists already; add --force"):
        run(source, tmp_path / "out", "--task", "noise")
    assert mine.read_text() == "mine"
    run(source, tmp_path / "out", "--task", "noise", "--force")
    assert not mine.exists() or mine.read_text() != "mine"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "GT", "LQ", "parameters.jsonl", "settings.json"]  # fmt: skip


def test_originals_are_never_a_target(source: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    for out, name in ((tmp_path, "clean"), (source, "more"), (source / "more", "GT")):
        with pytest.raises(OptionError, match="would overwrite the originals"):
            run(source, out, "--task", "noise", "--gt", name, "--force")
    assert files(tmp_path) == before


def test_every_option_belongs_to_a_field() -> None:
    from dataclasses import fields

    for task, kind in TASKS.items():
        assert tuple(field.name for field in fields(kind)) == OPTIONS_OF[task]  # type: ignore[arg-type]
    assert build("noise", {"sigma": "15", "angle": None}) == Noise((15, 15))
    text = re.sub(r"\x1b\[[0-9;]*m", "", run("--help"))
    assert [name for names in OPTIONS_OF.values() for name in names
            if f"--{name.replace('_', '-')} " not in text] == []  # fmt: skip
