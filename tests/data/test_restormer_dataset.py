"""Restormer's data sets: pairs whose small images are mirrored, and noise that is added on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset

from kdsr.data.checks import check_dataset
from kdsr.data.restormer_dataset import mirrored
from kdsr.data.seeded_dataset import SeededDataset

TRAINING = {"name": "x", "phase": "train", "scale": 1, "gt_size": 64, "use_hflip": True, "use_rot": True}


def gaussian(photos: Path, **changes: Any) -> dict[str, Any]:
    return {
        **TRAINING, "type": "Dataset_GaussianDenoising", "dataroot_gt": str(photos / "GT"),
        "sigma_type": "constant", "sigma_range": 25, "in_ch": 3, **changes,
    }  # fmt: skip


def pairs(photos: Path, kind: str, **changes: Any) -> dict[str, Any]:
    return {
        **TRAINING, "type": kind, "dataroot_gt": str(photos / "GT"), "dataroot_lq": str(photos / "LR_x2"),
        "scale": 2, "io_backend": {"type": "disk"}, **changes,
    }  # fmt: skip


def loaded(options: dict[str, Any], seed: int = 5) -> SeededDataset:
    return SeededDataset(build_dataset(options), seed)


def test_mirrored_by_hand() -> None:
    row = np.array([[[1], [2], [3]]])
    assert mirrored(row, 5)[..., 0].tolist() == [[1, 2, 3, 3, 2]] * 5
    assert mirrored(row, 1) is row


@pytest.mark.parametrize("more", [{}, {"mean": [0.5] * 3, "std": [0.2] * 3}, {"color": "y"}])
def test_large_images_give_the_patches_of_pairs(photos: Path, more: dict[str, Any]) -> None:
    ours = loaded(pairs(photos, "Dataset_PairedImage", **more))
    stock = loaded(pairs(photos, "PairedImageDataset", **more))
    for position in range(8):
        item, wanted = ours[3, position], stock[3, position]
        assert item.keys() == wanted.keys()
        assert torch.equal(item["lq"], wanted["lq"]) and torch.equal(item["gt"], wanted["gt"])


def test_small_images_are_mirrored(photos: Path) -> None:
    options = pairs(photos, "Dataset_PairedImage", gt_size=128, use_hflip=False, use_rot=False)
    assert check_dataset(options, 2) == []
    dataset = loaded(options)
    item = dataset[0, 0]
    image = cv2.imread(item["gt_path"])[..., ::-1].transpose(2, 0, 1)
    assert item["gt"].shape == (3, 128, 128) and item["lq"].shape == (3, 64, 64)
    gt = np.round(item["gt"].numpy() * 255)
    assert np.array_equal(gt[:, :96, :96], image)
    assert np.array_equal(gt[:, 96:, 96:], image[:, :63:-1, :63:-1])
    problems = check_dataset({**options, "type": "PairedImageDataset"}, 2)
    assert len(problems) == 1 and problems[0].startswith("gt_size: 128 is larger than")


def test_noise_is_a_function_of_seed_epoch_and_position(photos: Path) -> None:
    dataset, again = (loaded(gaussian(photos)) for _ in range(2))
    item = dataset[2, 1]
    assert torch.equal(again[2, 1]["lq"], item["lq"]) and not torch.equal(dataset[3, 1]["lq"], item["lq"])
    noise = torch.cat([(dataset[0, n]["lq"] - dataset[0, n]["gt"]).flatten() for n in range(16)]) * 255
    assert noise.mean().item() == pytest.approx(0, abs=0.3)
    assert noise.std().item() == pytest.approx(25, rel=0.01)
    assert item["lq"].shape == item["gt"].shape == (3, 64, 64) and item["lq"].dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "given", "expected"), [("random", [10, 50], (10, 50)), ("choice", [15, 15, 15], (15, 15))]
)
def test_how_strong_it_is(photos: Path, kind: str, given: list[int], expected: tuple[int, int]) -> None:
    dataset = loaded(gaussian(photos, sigma_type=kind, sigma_range=given))
    items = [dataset[0, position] for position in range(12)]
    found = [255 * (item["lq"] - item["gt"]).std().item() for item in items]
    assert all(0.95 * expected[0] < sigma < 1.05 * expected[1] for sigma in found)
    if kind == "random":
        assert max(found) - min(found) > 10


@pytest.mark.parametrize("channels", [3, 1])
def test_validation_noise_is_fixed(photos: Path, channels: int) -> None:
    """That of NumPy's generator with seed 0, in the order (H, W, RGB), not clipped."""
    item = loaded(gaussian(photos, phase="val", sigma_test=25, in_ch=channels))[0]
    file = str(photos / "GT" / "astronaut.png")
    image = (
        cv2.imread(file)[..., ::-1] if channels == 3 else cv2.imread(file, cv2.IMREAD_GRAYSCALE)[..., None]
    )
    image = image.astype(np.float32) / 255
    state = np.random.RandomState(0)
    noisy = (image + state.normal(0, 25 / 255, image.shape)).astype(np.float32)
    assert np.array_equal(item["gt"].numpy(), image.transpose(2, 0, 1))
    assert np.array_equal(item["lq"].numpy(), noisy.transpose(2, 0, 1)) and noisy.max() > 1


def test_small_grey_images_are_mirrored(photos: Path) -> None:
    item = loaded(gaussian(photos, gt_size=128, in_ch=1, sigma_range=0))[0, 0]
    assert item["lq"].shape == (1, 128, 128) and torch.equal(item["lq"], item["gt"])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sigma_range": [1, 2]}, "sigma_range: [1, 2] must be a number for sigma_type: constant"),
        ({"sigma_type": "random"}, "sigma_range: 25 must be two numbers for sigma_type: random"),
        ({"sigma_type": "choice"}, "sigma_range: 25 must be a list of numbers for sigma_type: choice"),
        ({"in_ch": 2}, "in_ch: 2 is neither 3 (RGB) nor 1 (grey)"),
        ({"phase": "val"}, "sigma_test: is required"),
        ({"gt_size": None}, "gt_size: is required in training"),
    ],
)
def test_what_is_missing_or_does_not_fit(photos: Path, changes: dict[str, Any], problem: str) -> None:
    assert check_dataset(gaussian(photos), 1) == []
    assert check_dataset(gaussian(photos, **changes), 1) == [problem]
