"""``kdsr distill``: the plan, a short training, the table; wrong input leaves nothing behind."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network

from kdsr import cli
from kdsr.models.metrics_file import recorded_means
from kdsr.options.files import load
from kdsr.runtime.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
RGB = {"num_in_ch": 3, "num_out_ch": 3}
EDSR = {"type": "EDSR", **RGB, "num_feat": 16, "num_block": 3, "upscale": 2, "res_scale": 0.1}
NAFNET = {"type": "NAFNet", "width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}
ITERS = 4


def checkpoint(file: Path, options: dict[str, Any]) -> Path:
    """A network of random weights, of which nothing but tensors is in the file."""
    torch.manual_seed(0)
    torch.save({"params": build_network(dict(options)).state_dict()}, file)
    return file


def kdsr(*words: object) -> int:
    """The exit code of a command in this process."""
    argv, sys.argv = sys.argv, ["kdsr", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as left:
            cli.main()
    finally:
        sys.argv = argv
    return int(left.value.code or 0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Iterator[tuple[Path, list[object]]]:
    """A finished distillation: its folder, and the arguments."""
    folder = tmp_path_factory.mktemp("distil")
    before = Path.cwd()
    os.chdir(folder)
    try:
        teacher = checkpoint(folder / "big.pth", EDSR)
        words: list[object] = [
            "distill",
            teacher,
            "--images",
            photos / "GT",
            "--iters",
            ITERS,
            "--size",
            "5x",
        ]
        assert kdsr(*words) == 0
        yield folder / "experiments/distill_big", words
    finally:
        os.chdir(before)


@pytest.mark.slow  # trains and exports
def test_a_student_is_trained_measured_and_exported(finished: tuple[Path, list[object]]) -> None:
    out, _ = finished
    options = load(out / "distill.yml")
    run = out / options["name"]
    assert options["network_g"]["type"] == "EDSR"
    saved = read_checkpoint(run / "models/net_g_latest.pth")
    student = build_network(dict(options["network_g"]))
    student.load_state_dict(saved["params"], strict=True)
    assert saved["network"] == options["network_g"]
    table = (out / "result.md").read_text()
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]]
        for line in table.splitlines()
    }
    parameters = sum(parameter.numel() for parameter in student.parameters())
    assert rows["student"][0] == f"{parameters:,}"
    measured = {"bicubic": (0, "baseline"), "teacher": (0, "teacher"), "student": (ITERS, "student")}
    for row, (iteration, network) in measured.items():
        means = recorded_means(run / "metrics.csv", iteration, "val", network)
        assert rows[row][2:4] == [f"{means['psnr']:.2f}", f"{means['ssim']:.4f}"]
    assert (out / "student.onnx").stat().st_size > 1000 and (
        out / "student.safetensors"
    ).stat().st_size > 1000
    assert kdsr("test", run) == 0


@pytest.mark.slow
def test_given_again_it_resumes_and_does_not_train_again(
    finished: tuple[Path, list[object]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = finished
    monkeypatch.chdir(out.parents[1])
    run = out / load(out / "distill.yml")["name"]
    weights = run / "models/net_g_latest.pth"
    before = weights.stat().st_mtime_ns
    assert kdsr(*words) == 0
    printed = capfd.readouterr().out
    assert weights.stat().st_mtime_ns == before
    assert "as it is there" in printed and "| student" in printed
    assert "Warning: the student is below bicubic" in printed  # after so few iterations
    assert kdsr(*words, "--size", "3x") == 2
    assert "was written with other arguments" in capfd.readouterr().err
    text = (out / "distill.yml").read_text()
    (out / "distill.yml").write_text(text.replace(f"total_iter: {ITERS}", f"total_iter: {ITERS + 2}"))
    assert kdsr(*words) == 0
    log = max(run.glob("*.log"), key=lambda path: path.stat().st_mtime_ns).read_text()
    assert f"iter: {ITERS}." in log and weights.stat().st_mtime_ns > before
    assert recorded_means(run / "metrics.csv", ITERS + 2, "val")


def test_a_dry_run_writes_a_file_to_train_with(
    here: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher = checkpoint(here / "big.pth", EDSR)
    words = [
        "distill",
        teacher,
        "--images",
        photos / "GT",
        "--method",
        "FAKD",
        "--iters",
        "2",
        "--size",
        "8x",
    ]
    assert kdsr(*words, "--dry-run") == 0
    printed = capfd.readouterr().out
    assert "EDSR, scale 2, recognised by its tensors" in printed
    assert "3 to train on, 1 held out" in printed
    assert re.search(r"taps: body\.0 → body\.0, .*body\.2 → body\.\d", printed)
    assert re.search(r"time +about \d+ (s|min)", printed)
    file = here / "experiments/distill_big/distill.yml"
    assert sorted(path.name for path in file.parent.iterdir()) == ["data", "distill.yml"]
    options = load(file)
    assert options["scale"] == 2 and options["train"]["total_iter"] == 2
    assert options["train"]["taps"][0] == {"student": "body.0", "teacher": "body.0"}
    assert kdsr("train", "-opt", file) == 0
    assert (file.parent / "FAKD_EDSR_x2/models/net_g_latest.pth").exists()


def test_images_without_ground_truth(here: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = checkpoint(here / "rain.pth", NAFNET)
    assert kdsr("distill", teacher, "--lq", photos / "GT", "--size", "4x", "--iters", "2", "--dry-run") == 0
    assert "no ground truth: the teacher's output is learnt" in capfd.readouterr().out
    file = here / "experiments/distill_rain/distill.yml"
    options = load(file)
    assert options["datasets"]["train"]["type"] == "LQImageDataset" and not options["train"].get("pixel_opt")
    assert options["network_g"]["type"] == "NAFNet"
    assert kdsr("train", "-opt", file) == 0
    metrics = recorded_means(here / "experiments/distill_rain/Logits_no_gt_NAFNet/metrics.csv", 2, "val")
    assert 0 < metrics["psnr"] < 100


def test_pairs_of_one_size(here: Path, photos: Path) -> None:
    (here / "lq").mkdir()
    for file in (photos / "GT").iterdir():
        cv2.imwrite(str(here / "lq" / file.name), np.clip(cv2.imread(str(file)).astype(int) + 9, 0, 255))
    teacher = checkpoint(here / "rain.pth", NAFNET)
    words = ["distill", teacher, "--gt", photos / "GT", "--lq", here / "lq", "--size", "4x", "--dry-run"]
    assert kdsr(*words, "--method", "SLKD", "--iters", "2") == 0
    options = load(here / "experiments/distill_rain/distill.yml")
    assert options["datasets"]["train"]["type"] == "PairedImageDataset"
    assert [pair["student"] for pair in options["train"]["encoder_taps"]] == ["encoders.0", "encoders.1"]


def test_the_range_of_a_teacher_is_measured(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "photos").mkdir()
    for file in sorted((ROOT / "docs/images").glob("*.png")):
        image = cv2.imread(str(file))
        for index in range(3):
            cv2.imwrite(
                str(here / f"photos/{file.stem}{index}.png"), image[100 * index : 100 * index + 100, :100]
            )
    teacher = ROOT / "experiments/pretrained_models/EDSR_x4.pth"
    assert kdsr("distill", teacher, "--images", "photos", "--size", "50x", "--out", "out", "--dry-run") == 0
    assert (
        "measured, not shown by tensors: res_scale 1, img_range 255, rgb_mean 0.4488"
        in capfd.readouterr().out
    )
    assert load(here / "out/distill.yml")["network_t"]["img_range"] == 255.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text.pth", "--images", "GT"], "cannot be read as a torch checkpoint"),
        (["none.pth", "--images", "GT"], "none.pth: no such file"),
        (["other.pth", "--images", "GT"], "the nearest architecture that kdsr knows is EDSR"),
        (["other.pth", "--images", "GT"], "--opt FILE"),
        (["unknown.pth", "--images", "GT"], "--opt FILE"),
        (["grey.pth", "--images", "GT"], "1 input and 1 output channels"),
        (["big.pth", "--images", "empty"], "--images: There is no image in"),
        (["big.pth", "--images", "nowhere"], "--images: There is no folder nowhere"),
        (["big.pth", "--images", "LR_x4"], "smaller than a training patch"),
        (["big.pth"], "give --images FOLDER"),
        (["big.pth", "--images", "GT", "--student", "wide.yml"], "a student must be smaller"),
        (["big.pth", "--images", "GT", "--student", "EDSSR"], "did you mean EDSR"),
        (["big.pth", "--images", "GT", "--size", "tiny"], "--size 'tiny': give how many times"),
        (["big.pth", "--images", "GT", "--method", "FAKKD"], "--method FAKKD: .*FAKD"),
        (["big.pth", "--images", "GT", "--method", "Scratch"], "is no method with a teacher"),
        (
            ["big.pth", "--images", "GT", "--method", "SLKD"],
            "levels of an encoder and a decoder, EDSR has none",
        ),
        pytest.param(
            ["big.pth", "--images", "GT", "--device", "cuda"],
            "--device cuda: torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_input_is_one_or_two_lines_and_leaves_nothing(
    here: Path, photos: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    for name in ("GT", "LR_x4"):
        (here / name).symlink_to(photos / name)
    (here / "empty").mkdir()
    (here / "text.pth").write_text("no checkpoint")
    checkpoint(here / "big.pth", EDSR)
    checkpoint(here / "grey.pth", {"type": "SRVGGNetCompact", "num_in_ch": 1, "num_out_ch": 1, "num_feat": 8})
    state = build_network(dict(EDSR)).state_dict()
    torch.save({"params": {**state, "extra.weight": torch.zeros(1)}}, here / "other.pth")
    torch.save({"params": {"extra.weight": torch.zeros(1)}}, here / "unknown.pth")
    (here / "wide.yml").write_text(
        "{type: EDSR, num_in_ch: 3, num_out_ch: 3, num_feat: 32, num_block: 3, upscale: 2}"
    )
    before = sorted(here.iterdir())
    assert kdsr("distill", *words) == 2
    error = capfd.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
    assert len(error.strip().splitlines()) <= 3
    assert sorted(here.iterdir()) == before
