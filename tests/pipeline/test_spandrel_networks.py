"""Networks that spandrel recognises, as teacher and student of whole runs; and students that go back to it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
import yaml
from basicsr.archs import build_network
from torch import nn

from kdsr import test as test_entry
from kdsr.options.check import check
from small_runs import run
from spandrel_files import TINY, plain, write

LATEST = "experiments/run/models/net_g_latest.pth"
L1 = {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def log() -> str:
    return "".join(file.read_text(encoding="utf-8") for file in Path("experiments/run").glob("train_*.log"))


@pytest.fixture
def options(run_options: dict[str, Any], photos: Path, tmp_path: Path) -> dict[str, Any]:
    """A run at ×2: the blocks of both networks are their files."""
    run_options["scale"] = 2
    for dataset in run_options["datasets"].values():
        dataset["dataroot_lq"] = str(photos / "LR_x2")
    run_options["train"].update(total_iter=2, logits_opt=dict(L1))
    run_options["network_g"] = {"type": "Spandrel", "path": str(write("SAFMN", tmp_path / "g.pth", 1))}
    run_options["network_t"] = {"type": "Spandrel", "path": str(write("RCAN", tmp_path / "t.pth", 2))}
    return run_options


def of_equal_size(options: dict[str, Any], tmp_path: Path, gt_size: int = 64) -> None:
    """Turns the run into one that keeps the size, on photographs that have room for the patches."""
    folder = tmp_path / "noisy"
    for name, place in {"LQ": 1, "GT": 0}.items():
        (folder / name).mkdir(parents=True)
        for index, image in enumerate((skimage.data.astronaut(), skimage.data.chelsea())):
            pixels = image[60:200, 100:240, ::-1].astype(float)
            noise = np.random.default_rng(index).normal(0, 20, pixels.shape) * place
            assert cv2.imwrite(str(folder / name / f"{index}.png"), (pixels + noise).clip(0, 255))
    options["scale"] = 1
    for dataset in options["datasets"].values():
        dataset.update(dataroot_lq=str(folder / "LQ"), dataroot_gt=str(folder / "GT"))
    options["datasets"]["train"].update(gt_size=gt_size, batch_size_per_gpu=1)


def restored(net: nn.Module, lq: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(lq).clamp(0, 1)


@pytest.mark.parametrize("name", [name for name in TINY if name != "DnCNN"])
def test_each_is_teacher_and_student_and_goes_back_to_spandrel(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    scale, size = TINY[name][2:]
    if scale == 1:
        of_equal_size(options, tmp_path, gt_size=128 if name == "Uformer" else 64)
    student, teacher = (write(name, tmp_path / f"{role}.pth", seed) for seed, role in enumerate("gt"))
    options["network_g"]["path"], options["network_t"]["path"] = str(student), str(teacher)
    options["val"]["teacher"] = True
    if name == "SAFMN":
        options["precision"] = {"amp": "bf16", "allow_slow": True}
    assert run(options) == 0
    message = log()
    assert f"net_t: {name}, scale {scale}, read by spandrel from {teacher}" in message
    assert "l_pix:" in message and "l_ts:" in message and "Validation of the teacher" in message

    trained = plain(LATEST)  # spandrel alone, which takes params_ema
    assert trained.architecture.name == name and trained.scale == scale
    lq = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    ours = build_network({"type": "Spandrel", "path": LATEST})
    torch.testing.assert_close(restored(ours, lq), trained(lq.clone()), rtol=0, atol=1e-6)
    assert not torch.equal(trained(lq.clone()), plain(student)(lq.clone()))  # it has learnt something


OURS: dict[str, dict[str, Any]] = {
    "SwinIR": {"type": "SwinIR", "upscale": 2, "img_size": 16, "window_size": 8, "depths": [2], "embed_dim": 12,
               "num_heads": [2], "mlp_ratio": 2, "upsampler": "pixelshuffledirect", "resi_connection": "1conv"},
    "NAFNet": {"type": "NAFNet", "width": 8, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_a_student_of_our_own_networks_loads_into_spandrel(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if name == "NAFNet":
        of_equal_size(options, tmp_path)
        options["network_t"]["path"] = str(write("NAFNet", tmp_path / "t.pth"))
    options["network_g"] = OURS[name]
    options["logger"]["save_safetensors"] = True
    assert run(options) == 0
    ours = build_network(OURS[name])
    ours.load_state_dict(torch.load(LATEST, weights_only=True)["params_ema"])
    lq = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    for file in (LATEST, LATEST.replace(".pth", ".safetensors")):
        theirs = plain(file)
        assert theirs.architecture.name == name
        torch.testing.assert_close(theirs(lq.clone()), restored(ours, lq), rtol=0, atol=1e-5)


def measured(folder: str, name: str) -> dict[str, float]:
    with open(Path(folder, name, "metrics.csv"), newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == "student"]
    last = rows[-1]["iteration"]
    return {row["image"]: float(row["value"]) for row in rows if row["iteration"] == last}


def test_the_student_is_resumed_and_tested(options: dict[str, Any], tmp_path: Path) -> None:
    """Its architecture is in the file it began with; the weights are in the checkpoint, which also is enough alone."""
    options["logger"]["save_checkpoint_freq"] = 1
    assert run(options, "--force_yml", "train:total_iter=1") == 0
    assert run(options, "--auto_resume") == 0
    assert torch.load("experiments/run/training_states/2.state", weights_only=True)["iter"] == 2
    of_run = measured("experiments", "run")
    test = {key: options[key] for key in ("model_type", "scale", "num_gpu", "val")}
    test["datasets"] = {"test_photos": options["datasets"]["val"]}
    blocks = {
        "weights": (options["network_g"], {"pretrain_network_g": LATEST}),
        "alone": ({"type": "Spandrel", "path": LATEST}, {}),
    }
    for name, (network, path) in blocks.items():
        # the teacher's file need not be where a student is tested
        gone = {"type": "Spandrel", "path": "nowhere.pth"}
        text = yaml.safe_dump(test | {"name": name, "network_g": network, "network_t": gone, "path": path})
        Path("test.yml").write_text(text, encoding="utf-8")
        assert test_entry.main(["-opt", "test.yml"]) == 0
        assert measured("results", name) == pytest.approx(of_run, abs=1e-4)


def test_another_teacher_under_the_same_name_is_noticed(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options["logger"]["save_checkpoint_freq"] = 1
    assert run(options) == 0
    write("RCAN", Path(options["network_t"]["path"]), seed=9)
    assert run(options, "--auto_resume", "--force_yml", "train:total_iter=3") == 2
    assert "network_t.path: the weights have changed" in capsys.readouterr().err


def test_a_student_is_not_read_from_the_folder_of_its_run(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(options) == 0
    options["network_g"]["path"] = LATEST
    assert run(options) == 2
    assert f"network_g.path: {LATEST} is in the folder of this run" in capsys.readouterr().err


def test_the_students_blocks_may_be_the_teachers(options: dict[str, Any]) -> None:
    options["network_t"]["path"] = options["network_g"]["path"]
    options["network_g"] = {"type": "Spandrel", "path": options["network_g"]["path"]}
    options["path"]["init_from"] = "teacher"
    assert run(options) == 0
    assert "net_g starts from teacher" in log()


def test_half_precision_is_disabled_if_spandrel_does_not_support_it(options: dict[str, Any]) -> None:
    options["precision"] = {"amp": "fp16", "allow_slow": True}
    assert run(options) == 0
    for net in ("net_g", "net_t"):
        assert f"{net}: does not work in fp16 (precision), it is computed in float32" in log()


def test_features_of_a_grey_teacher_are_compared(options: dict[str, Any], tmp_path: Path) -> None:
    of_equal_size(options, tmp_path, gt_size=32)
    options["model_type"] = "FACDModel"
    options["network_g"]["path"] = str(write("NAFNet", tmp_path / "g.pth"))
    options["network_t"]["path"] = str(write("DnCNN", tmp_path / "t.pth"))
    options["train"].update(
        facd_opt={"type": "FACDLoss"}, taps=[{"student": "intro", "teacher": "model.2"}], logits_opt=None
    )
    options["datasets"]["train"]["batch_size_per_gpu"] = 2
    assert run(options) == 0
    assert "l_facd:" in log()


# ------------------------------------------------------------------------------------------------------ bad input


def refused(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(options) == 2
    assert not Path("experiments").exists()
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_another_scale_is_found_before_anything_is_built(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("NAFNet", tmp_path / "t.pth")
    assert (
        f"network_t.path: {tmp_path / 't.pth'} is a network of scale 1 (NAFNet), but scale is 2"
        in refused(options, capsys)
    )


def test_files_that_cannot_be_used_are_listed_together(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"params": nn.Conv2d(3, 3, 1).state_dict()}, tmp_path / "own.pth")
    options["network_g"]["path"], options["network_t"]["path"] = "none.pth", str(tmp_path / "own.pth")
    message = refused(options, capsys)
    assert "network_g.path: none.pth: no such file" in message
    assert "network_t.path: " in message and "not of an architecture that spandrel" in message


def test_patches_are_compared_with_what_the_network_takes(options: dict[str, Any], tmp_path: Path) -> None:
    options["datasets"]["train"]["gt_size"] = 40
    assert check(options, is_train=True) == [
        "datasets.train.gt_size: 40 gives LQ patches of 20, but network_g (Spandrel) takes multiples of 8"
    ]


@pytest.mark.parametrize("key", ["path", "paht"])
def test_a_block_without_its_path(options: dict[str, Any], key: str) -> None:
    options["network_t"] = {"type": "Spandrel"} | ({key: "x.pth"} if key != "path" else {})
    problems = check(options, is_train=True)
    assert "network_t.path: is required by Spandrel" in problems
    assert ("network_t.paht: Spandrel has no such parameter; did you mean path?" in problems) == (
        key != "path"
    )


@pytest.mark.parametrize(
    ("teacher", "gives"),
    [
        ({"type": "NAFNet", "width": 8}, "3×32×32"),
        ({"type": "RLFN", "out_channels": 1, "feature_channels": 8, "num_blocks": 1, "esa_channels": 4, "upscale": 2},
         "1×64×64"),
    ],
)  # fmt: skip
def test_a_teacher_of_any_type_with_other_outputs_is_refused(
    options: dict[str, Any],
    teacher: dict[str, Any],
    gives: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither says its scale, and of the channels a loss would take one for three."""
    options["network_t"] = teacher
    torch.save({"params": build_network(teacher).state_dict()}, tmp_path / "t.pth")
    options["path"]["pretrain_network_t"] = str(tmp_path / "t.pth")
    capsys.readouterr()  # BasicSR's logger, of which an earlier test has closed the stream
    message = refused(options, capsys)
    assert f"network_t: {teacher['type']} gives {gives}, expected 3×64×64" in message
