"""What several tests of the tools share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from basicsr.archs import build_network

from kdsr import cli
from small_networks import small_vqgan

_NET = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "upscale": 2}


@pytest.fixture
def step_file(tmp_path: Path) -> Path:
    """The option file of a small DCKD run, without checkpoints and data."""
    l1 = {"type": "L1Loss", "loss_weight": 1.0}
    options = {
        "name": "tiny",
        "model_type": "DCKDModel",
        "scale": 2,
        "num_gpu": "auto",
        "manual_seed": 3,
        "datasets": {
            "train": {
                "name": "none",
                "type": "PairedImageDataset",
                "dataroot_gt": "nowhere",
                "dataroot_lq": "nowhere",
                "io_backend": {"type": "disk"},
                "gt_size": 32,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": 0,
                "batch_size_per_gpu": 1,
            }
        },
        "network_g": {**_NET, "num_block": 1},
        "network_t": {**_NET, "num_block": 2},
        "network_his": True,
        "network_vqgan": small_vqgan(2),
        "path": {"pretrain_network_t": "nowhere/teacher.pth"},
        "train": {
            "ema_decay": 0.999,
            "optim_g": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "MultiStepLR", "milestones": [10], "gamma": 0.5},
            "total_iter": 10,
            "warmup_iter": -1,
            "pixel_opt": l1,
            "logits_opt": l1,
            "cl_opt": {"type": "ContrasLoss", "loss_weight": 0.1, "weights": [0.5, 1.0]},
            "ce_opt": {"type": "CELoss", "loss_weight": 0.001},
            "num_neg": 2,
        },
    }
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return path


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs ``kdsr WORDS...`` in this process; returns exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdsr", *map(str, words)])
        capfd.readouterr()  # what the test itself has printed
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (int(end.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture
def nearest(tmp_path: Path) -> Callable[..., Path]:
    """Makes a checkpoint whose network repeats each pixel ``scale`` times in both directions."""

    def make(scale: int = 2, channels: int = 3, name: str = "nearest") -> Path:
        options = {
            "type": "SRVGGNetCompact", "num_in_ch": channels, "num_out_ch": channels, "num_feat": 4, "num_conv": 1,
            "upscale": scale,
        }  # fmt: skip
        weights = build_network(options).state_dict()
        for value in weights.values():
            value.zero_()
        file = tmp_path / "weights" / f"{name}.pth"
        file.parent.mkdir(exist_ok=True)
        torch.save({"params": weights}, file)
        return file

    return make
