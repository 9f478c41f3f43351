"""What several test files share: data beside the project, small real photographs, options of a small run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch

import kdsr  # noqa: F401  first: makes BasicSR importable
from kdsr.data.resize import imresize
from small_networks import small_vqgan

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Images, weights and vectors that lie beside the project and are no part of it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data beside the project ({SHARED.name}/), which is not here")
    return SHARED


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GT/ (four 96×96 crops of real photographs), LR_x2/, LR_x3/, LR_x4/ and the same names in each."""
    root = tmp_path_factory.mktemp("photos")
    images = {
        "astronaut": skimage.data.astronaut()[40:136, 180:276],
        "cat": skimage.data.chelsea()[80:176, 120:216],
        "coffee": skimage.data.coffee()[150:246, 250:346],
        "rocket": skimage.data.rocket()[120:216, 280:376],
    }
    for name, image in images.items():
        bgr = np.ascontiguousarray(image[..., ::-1])
        for folder, pixels in {
            "GT": bgr,
            **{f"LR_x{scale}": imresize(bgr, 1 / scale) for scale in (2, 3, 4)},
        }.items():
            (root / folder).mkdir(exist_ok=True)
            assert cv2.imwrite(str(root / folder / f"{name}.png"), pixels)
    return root


EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": 4}
VQGAN = small_vqgan()


@pytest.fixture
def run_options(photos: Path) -> dict[str, Any]:
    """Options of a small ×4 run from scratch, as a dict to change and to write to an option file."""
    pair = {
        "type": "PairedImageDataset",
        "dataroot_gt": str(photos / "GT"),
        "dataroot_lq": str(photos / "LR_x4"),
        "io_backend": {"type": "disk"},
    }
    return {
        "name": "run",
        "model_type": "KDModel",
        "scale": 4,
        "num_gpu": "auto",
        "manual_seed": 3,
        "datasets": {
            "train": {
                **pair, "name": "photos", "gt_size": 64, "use_hflip": True, "use_rot": True,
                "num_worker_per_gpu": 0, "batch_size_per_gpu": 2, "dataset_enlarge_ratio": 1,
            },
            "val": {**copy.deepcopy(pair), "name": "held_out"},
        },
        "network_g": copy.deepcopy(EDSR),
        "path": {},
        "train": {
            "ema_decay": 0.9,
            "optim_g": {"type": "Adam", "lr": 1e-3, "betas": [0.9, 0.99]},
            "scheduler": {"type": "MultiStepLR", "milestones": [100], "gamma": 0.5},
            "total_iter": 3,
            "warmup_iter": -1,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "val": {
            "val_freq": 100,
            "save_img": False,
            "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 4, "test_y_channel": True}},
        },
        "logger": {"print_freq": 1, "save_checkpoint_freq": 100, "use_tb_logger": False},
    }  # fmt: skip


@pytest.fixture
def teacher_options(
    run_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """``run_options`` with a teacher, whose weights lie in the working directory, ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    from basicsr.archs import build_network

    teacher = {**run_options["network_g"], "num_feat": 12, "num_block": 2}
    torch.manual_seed(7)
    torch.save({"params": build_network(teacher).state_dict()}, "teacher.pth")
    run_options["network_t"] = teacher
    run_options["path"]["pretrain_network_t"] = "teacher.pth"
    return run_options


@pytest.fixture
def dckd_options(run_options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """``run_options`` with a teacher, a VQGAN and DCKD's losses; the teacher's file lies in ``tmp_path``."""
    from basicsr.archs import build_network

    teacher = {**EDSR, "num_feat": 12, "num_block": 2}
    torch.manual_seed(7)
    torch.save({"params": build_network(teacher).state_dict()}, tmp_path / "teacher.pth")
    torch.save({"state_dict": build_network(VQGAN).state_dict()}, tmp_path / "vqgan.ckpt")
    run_options["model_type"] = "DCKDModel"
    run_options["network_t"] = teacher
    run_options["network_his"] = True
    run_options["network_vqgan"] = copy.deepcopy(VQGAN)
    run_options["path"].update(
        pretrain_network_t=str(tmp_path / "teacher.pth"),
        pretrain_network_vqgan=str(tmp_path / "vqgan.ckpt"),
        param_key_vqgan="state_dict",
        strict_load_vqgan=False,
    )
    l1 = {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
    run_options["train"].update(
        logits_opt=dict(l1),
        lcr_opt=dict(l1),
        cl_opt={"type": "ContrasLoss", "loss_weight": 0.1, "d_func": "L1"},
        ce_opt={"type": "CELoss", "loss_weight": 0.001, "variant": "equation_9"},
        num_neg=2,
        gaussian_blur_prob=0.5,
        resize_prob=0.5,
        gaussian_noise_prob=1.0,
        step=2,
    )
    return run_options
