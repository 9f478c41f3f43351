"""Runs that are killed, starved and fed with damaged files: short, but of real steps on real photographs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from small_networks import small_vqgan


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.slow)


def write_options(folder: Path, options: dict[str, Any]) -> Path:
    """The option file ``run.yml`` in ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yml"
    file.write_text(yaml.safe_dump(options), encoding="utf-8")
    return file


@pytest.fixture
def logits_options(dckd_options: dict[str, Any]) -> dict[str, Any]:
    """The teacher's output and label consistency alone."""
    dckd_options["model_type"] = "KDModel"
    for key in ("network_his", "network_vqgan"):
        del dckd_options[key]
    for key in [key for key in dckd_options["path"] if key.endswith("_vqgan")]:
        del dckd_options["path"][key]
    train = dckd_options["train"]
    for key in (
        "cl_opt",
        "ce_opt",
        "num_neg",
        "gaussian_blur_prob",
        "resize_prob",
        "gaussian_noise_prob",
        "step",
    ):
        del train[key]
    return dckd_options


@pytest.fixture
def vqgan_options(run_options: dict[str, Any]) -> dict[str, Any]:
    """A VQGAN with its discriminator; codes are restarted, and the discriminator joins, within the run."""
    folder = run_options["datasets"]["train"]["dataroot_gt"]
    images = {"type": "ImageFolderDataset", "dataroot_gt": folder}
    loader = {
        key: run_options["datasets"]["train"][key] for key in ("num_worker_per_gpu", "batch_size_per_gpu")
    }
    run_options["datasets"] = {
        "train": {**images, **loader, "name": "photos", "gt_size": 32},
        "val": {**images, "name": "held_out"},
    }
    run_options.update(
        model_type="VQGANModel",
        scale=1,
        network_g=small_vqgan(3, 32, 32, decoder=True),
        network_d={"type": "PatchDiscriminator", "num_feat": 8, "num_layers": 2},
    )  # fmt: skip
    run_options["train"].update(
        optim_d=copy.deepcopy(run_options["train"]["optim_g"]),
        gan_opt={"type": "GANLoss", "gan_type": "hinge", "loss_weight": 0.8},
        gan_start=4,
        restart_every=5,
    )
    run_options["val"]["metrics"]["psnr"].update(crop_border=0, test_y_channel=False)
    return run_options
