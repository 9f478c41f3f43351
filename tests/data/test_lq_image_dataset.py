"""LQImageDataset: the same patches as in pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from torch.utils.data import DataLoader

from kdsr.data.checks import check_dataset
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.prepare.pair_writer import write_lmdb
from kdsr.runtime.errors import DataError

COMMON = {"name": "lq", "phase": "train", "scale": 4, "gt_size": 64, "use_hflip": True, "use_rot": True}


def options(root: Path, **changes: Any) -> dict[str, Any]:
    return {**COMMON, "type": "LQImageDataset", "dataroot_lq": str(root), **changes}


def test_the_patches_are_those_of_pairs(photos: Path) -> None:
    pairs = {
        **COMMON, "type": "PairedImageDataset", "dataroot_gt": str(photos / "GT"),
        "dataroot_lq": str(photos / "LR_x4"), "io_backend": {"type": "disk"},
    }  # fmt: skip
    alone = SeededDataset(build_dataset(options(photos / "LR_x4")), 5)
    paired = SeededDataset(build_dataset(pairs), 5)
    for position in range(12):
        item = alone[3, position]
        assert set(item) == {"lq", "lq_path"} and item["lq"].shape == (3, 16, 16)
        assert torch.equal(item["lq"], paired[3, position]["lq"])
    assert torch.equal(alone[3, 0, 48]["lq"], paired[3, 0, 48]["lq"])  # a later stage's patches


def test_whole_images_outside_training(photos: Path) -> None:
    dataset = build_dataset(options(photos / "LR_x4", phase="val"))
    image = cv2.imread(str(photos / "LR_x4" / "astronaut.png"))[..., ::-1].transpose(2, 0, 1)
    assert np.array_equal(np.round(dataset[0]["lq"].numpy() * 255), image)


def test_lmdb_and_workers(photos: Path, tmp_path: Path) -> None:
    folder = photos / "LR_x4"
    shapes = {file.stem: cv2.imread(str(file)).shape for file in folder.glob("*.png")}
    write_lmdb(folder, tmp_path / "lq.lmdb", shapes)
    from_disk = SeededDataset(build_dataset(options(folder)), 0)
    from_lmdb = SeededDataset(build_dataset(options(tmp_path / "lq.lmdb", io_backend={"type": "lmdb"})), 0)
    sampler = [(2, position) for position in range(6)]
    loaded = [
        torch.cat([batch["lq"] for batch in DataLoader(dataset, 2, sampler=sampler, num_workers=workers)])
        for dataset, workers in ((from_disk, 0), (from_lmdb, 0), (from_lmdb, 1))
    ]
    assert torch.equal(loaded[0], loaded[1]) and torch.equal(loaded[0], loaded[2])


def test_bad_input_is_named(photos: Path, tmp_path: Path) -> None:
    dataset = SeededDataset(build_dataset(options(photos / "LR_x4", gt_size=128)), 0)
    with pytest.raises(
        DataError, match=r"gt_size 128 \(LQ patches of 32\) is larger than the image .*png \(24x24\)"
    ):
        dataset[0, 0]
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="Cannot read image .*bad.png"):
        SeededDataset(build_dataset(options(tmp_path)), 0)[0, 0]


def test_the_check_of_its_files(photos: Path) -> None:
    def found(scale: int = 4, **changes: Any) -> list[str]:
        return check_dataset(options(photos / "LR_x4", **changes), scale)

    assert found() == [] and found(gt_size=96) == []
    assert "gt_size: 100 makes LQ patches of 25, which are larger than" in found(gt_size=100)[0]
    assert found(gt_size=66) == ["gt_size: 66 is not a multiple of the scale 4"]
    assert found(gt_size=None) == ["gt_size: is required in training"]
    assert found(gt_size=None, phase="val") == []
    assert found(dataroot_lq="x") == ["dataroot_lq: there is no folder x"]
    assert "gt_size: 25 is larger than" in found(1, gt_size=25)[0]


def test_whole_images_of_several_sizes_make_no_batch(photos: Path, tmp_path: Path) -> None:
    whole = {"type": "SingleImageDataset", "dataroot_lq": str(tmp_path), "io_backend": {"type": "disk"}}
    for name, size in (("a", (20, 24)), ("b", (20, 24)), ("c", (24, 20))):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((*size, 3), np.uint8))
    (problem,) = check_dataset({**whole, "batch_size_per_gpu": 2}, 4, "train")
    assert problem.startswith(
        "batch_size_per_gpu: SingleImageDataset loads whole images, and b.png is 20x24, c.png"
    )
    assert check_dataset({**whole, "batch_size_per_gpu": 1}, 4, "train") == []
    assert check_dataset({**whole, "batch_size_per_gpu": 2}, 4, "val") == []
    (tmp_path / "c.png").unlink()
    assert check_dataset({**whole, "batch_size_per_gpu": 2}, 4, "train") == []
