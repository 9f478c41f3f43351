"""Options of a VQGAN so small that its training steps are quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from small_networks import small_vqgan


@pytest.fixture
def vqgan_options(run_options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    for name in ("train", "val"):
        run_options["datasets"][name]["dataroot_lq"] = run_options["datasets"][name]["dataroot_gt"]
    run_options["datasets"]["val"].update(phase="val", scale=1)
    run_options.update(
        model_type="VQGANModel",
        scale=1,
        num_gpu=0,
        dist=False,
        rank=0,
        world_size=1,
        is_train=True,
        network_g=small_vqgan(3, 32, decoder=True),
        path={
            key: str(tmp_path) for key in ("models", "training_states", "experiments_root", "visualization")
        },
    )
    run_options["train"].update(ema_decay=0, restart_every=5, vq_opt={"type": "VQLoss"})
    run_options["val"]["metrics"]["psnr"].update(crop_border=0, test_y_channel=False)
    return run_options
