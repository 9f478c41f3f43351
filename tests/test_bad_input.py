"""Wrong inputs of a run: one or two clear lines, the right exit code, nothing written or lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
import yaml
from basicsr.utils.lmdb_util import make_lmdb_from_imgs

from kdsr import train as train_entry

Options = dict[str, Any]
Result = tuple[int, list[str]]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Runs options that cannot be run; gives the lines of the error, and sees that no file came or went."""
    monkeypatch.chdir(tmp_path)

    def run(options: Options, *flags: str, code: int = 2) -> list[str]:
        Path("run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
        finished = Path("experiments/run/models/net_g_latest.pth")  # of an earlier run under the same name
        finished.parent.mkdir(parents=True, exist_ok=True)
        finished.write_text("kept")
        before = sorted(tmp_path.rglob("*"))
        assert train_entry.main(["-opt", "run.yml", *flags]) == code
        assert sorted(tmp_path.rglob("*")) == before
        assert finished.read_text() == "kept"
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdsr: error: ")]
        assert errors
        return [line.removeprefix("kdsr: error: ") for line in errors]

    return run


def test_all_unknown_keys_and_types_at_once_with_the_nearest_names(
    dckd_options: Options, refused: Any
) -> None:
    """Names that kdsr declares first, without an import of torch; then those of constructors, with everything else."""
    train = dckd_options["train"]
    dckd_options["trian"], train["num_negs"], dckd_options["datasets"]["train"]["gtsize"] = {}, 3, 3
    dckd_options["network_g"]["num_fet"] = 8
    dckd_options["network_t"]["type"] = "EDRS"
    train["cl_opt"]["d_fun"], train["optim_g"]["lrr"] = "L1", 1
    dckd_options["val"]["metrics"]["psnr"]["crop_bordr"] = 3
    declared = {"trian": "train", "train.num_negs": "num_neg", "datasets.train.gtsize": "gt_size"}
    others = {
        "network_g.num_fet": "num_feat", "network_t.type": "EDSR", "train.cl_opt.d_fun": "d_func",
        "train.optim_g.lrr": "lr", "val.metrics.psnr.crop_bordr": "crop_border",
    }  # fmt: skip
    for expected in (declared, others):
        text = "\n".join(refused(dckd_options))
        for key, nearest in expected.items():
            line = next((line for line in text.splitlines() if line.startswith(f"{key}:")), None)
            assert line is not None, f"{key} is not among:\n{text}"
            assert nearest in line
        for section, key in ((dckd_options, "trian"), (train, "num_negs")):
            section.pop(key, None)
        dckd_options["datasets"]["train"].pop("gtsize", None)


def test_what_cannot_be_cached(run_options: Options, refused: Any) -> None:
    run_options["datasets"]["train"]["cache"] = "rma"
    (line,) = refused(run_options)
    assert line.startswith("datasets.train.cache: 'rma' is neither ram nor null")
    run_options["datasets"]["train"]["cache"] = run_options["datasets"]["val"]["cache"] = "ram"
    assert refused(run_options) == ["datasets.val.cache: only a training set is cached; remove it"]


def test_a_missing_teacher(dckd_options: Options, refused: Any) -> None:
    dckd_options["path"]["pretrain_network_t"] = "weights/nowhere.pth"
    (line,) = refused(dckd_options)
    assert "path.pretrain_network_t" in line and "weights/nowhere.pth" in line


def test_a_teacher_of_another_width_names_the_first_five_parameters(
    dckd_options: Options, refused: Any
) -> None:
    dckd_options["network_t"]["num_feat"] = 16
    (line,) = refused(dckd_options)
    assert "path.pretrain_network_t" in line and "EDSR" in line
    assert line.count(" in the file, ") == 5 and "more" in line
    assert "conv_first.weight (12, 3, 3, 3) in the file, (16, 3, 3, 3) in the network" in line


def test_a_teacher_of_another_scale(dckd_options: Options, refused: Any) -> None:
    from basicsr.archs import build_network

    x2 = build_network({**dckd_options["network_t"], "upscale": 2})
    torch.save({"params": x2.state_dict()}, dckd_options["path"]["pretrain_network_t"])
    (line,) = refused(dckd_options)
    assert "path.pretrain_network_t" in line and "upsample" in line and "scale" in line


def test_a_key_that_the_checkpoint_has_not(dckd_options: Options, refused: Any) -> None:
    dckd_options["path"]["param_key_t"] = "state_dict"
    (line,) = refused(dckd_options)
    assert "param_key_t" in line and "state_dict" in line and "params" in line


def test_params_ema_falls_back_to_params_with_a_warning(
    dckd_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dckd_options["path"]["param_key_t"] = "params_ema"
    dckd_options["train"]["total_iter"] = 1
    Path("run.yml").write_text(yaml.safe_dump(dckd_options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml"]) == 0
    (log,) = Path("experiments/run").glob("train_run_*.log")
    warnings = [line for line in log.read_text().splitlines() if "WARNING" in line]
    assert any("params_ema" in line and "teacher.pth" in line for line in warnings)


@pytest.fixture
def own_photos(photos: Path, tmp_path: Path, run_options: Options) -> Path:
    """A copy of the photographs that a test may spoil, which ``run_options`` train on."""
    folder = tmp_path / "own"
    shutil.copytree(photos, folder)
    run_options["datasets"]["train"].update(dataroot_gt=str(folder / "GT"), dataroot_lq=str(folder / "LR_x4"))
    return folder


def test_gt_and_lq_that_do_not_match_the_scale(run_options: Options, own_photos: Path, refused: Any) -> None:
    shutil.copy(own_photos / "LR_x2/cat.png", own_photos / "LR_x4/cat.png")
    (line,) = refused(run_options)
    assert "cat.png" in line and "96" in line and "48" in line


def test_an_empty_and_a_missing_folder(run_options: Options, own_photos: Path, refused: Any) -> None:
    (own_photos / "empty").mkdir()
    run_options["datasets"]["train"]["dataroot_gt"] = str(own_photos / "empty")
    run_options["datasets"]["val"]["dataroot_lq"] = str(own_photos / "absent")
    text = "\n".join(refused(run_options))
    assert "datasets.train.dataroot_gt" in text and str(own_photos / "empty") in text
    assert "datasets.val.dataroot_lq" in text and str(own_photos / "absent") in text


def test_a_file_that_is_no_image(run_options: Options, own_photos: Path, refused: Any) -> None:
    (own_photos / "GT/cat.png").write_text("no picture")
    (line,) = refused(run_options)
    assert str(own_photos / "GT/cat.png") in line


def test_an_lmdb_without_its_meta_info(run_options: Options, own_photos: Path, refused: Any) -> None:
    for folder in ("GT", "LR_x4"):
        names = sorted(path.name for path in (own_photos / folder).iterdir())
        make_lmdb_from_imgs(
            str(own_photos / folder), str(own_photos / f"{folder}.lmdb"), names, [n[:-4] for n in names]
        )
        run_options["datasets"]["train"]["dataroot_gt" if folder == "GT" else "dataroot_lq"] += ".lmdb"
    run_options["datasets"]["train"]["io_backend"] = {"type": "lmdb"}
    (own_photos / "LR_x4.lmdb/meta_info.txt").unlink()
    (line,) = refused(run_options)
    assert "LR_x4.lmdb" in line and "meta_info.txt" in line


@pytest.mark.parametrize(("gt_size", "reason"), [(66, "scale"), (128, "96"), (72, "16")])
def test_a_patch_size_that_cannot_be(dckd_options: Options, refused: Any, gt_size: int, reason: str) -> None:
    """Not divisible by the scale; larger than an image; 72 pixels are no multiple of the VQGAN's 16."""
    dckd_options["datasets"]["train"]["gt_size"] = gt_size
    text = "\n".join(refused(dckd_options))
    assert "gt_size" in text and reason in text


def test_a_patch_that_swinir_cannot_take(run_options: Options, refused: Any) -> None:
    run_options["network_g"] = {
        "type": "SwinIR", "upscale": 4, "img_size": 16, "window_size": 8, "depths": [1], "embed_dim": 12,
        "num_heads": [2], "mlp_ratio": 2, "upsampler": "pixelshuffle", "resi_connection": "1conv",
    }  # fmt: skip
    run_options["datasets"]["train"]["gt_size"] = 48  # 12 pixels of LQ in windows of 8
    (line,) = refused(run_options)
    assert "gt_size" in line and "8" in line


def test_two_gpus_without_a_launcher(run_options: Options, refused: Any) -> None:
    lines = refused(run_options, "--force_yml", "num_gpu=2")
    assert "num_gpu" in lines[0]


def test_a_file_that_is_not_there_or_no_yaml(run_options: Options, refused: Any, tmp_path: Path) -> None:
    assert train_entry.main(["-opt", "nowhere.yml"]) == 2
    (tmp_path / "broken.yml").write_text("train: [1, 2\nname: x")
    assert train_entry.main(["-opt", "broken.yml"]) == 2


def test_a_validation_image_of_another_size(run_options: Options, own_photos: Path, refused: Any) -> None:
    """A validation image that was resized by hand: one pixel too few in its LQ."""
    path = own_photos / "LR_x4/coffee.png"
    cv2.imwrite(str(path), cv2.imread(str(path))[:-2])
    run_options["datasets"]["val"].update(
        dataroot_gt=str(own_photos / "GT"), dataroot_lq=str(own_photos / "LR_x4")
    )
    text = "\n".join(refused(run_options))
    assert "coffee.png" in text and "datasets.val" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision:amp=fp8", "precision.amp"),
        ("train:noisy={prob: 2}", "noisy.prob"),
        ("train:cl_opt:weights=[1, 2, 3]", "3 weights"),
        ("train:pixel_opt:reduction=avg", "reduction"),
        ("train:optim_g:lr=-1", "learning rate"),
        ("network_g:num_feat=0", "first step"),
        ("network_g:num_in_ch=1", "first step"),
        ("train:ema_decay=2", "train.ema_decay"),
        ("train:update_decay=5", "train.update_decay"),
        ("name=../evil", "name"),
        ("path:pretrain_network_vqgan=null", "path.pretrain_network_vqgan"),
        ("path:pretrain_network_t=null", "path.pretrain_network_t"),
        ("path:pretrain_network_g=experiments/run/models/net_g_latest.pth", "net_g_latest.pth"),
    ],
)
def test_what_only_a_first_step_or_a_second_look_shows(
    dckd_options: Options, refused: Any, override: str, message: str
) -> None:
    assert message in "\n".join(refused(dckd_options, "--force_yml", override))


def test_no_loss_at_all(run_options: Options, refused: Any) -> None:
    (line,) = refused(run_options, "--force_yml", "train:pixel_opt=null")
    assert "train: has no loss" in line
