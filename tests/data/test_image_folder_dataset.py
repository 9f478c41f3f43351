"""ImageFolderDataset: crops of a folder's images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset

from kdsr.data.seeded_dataset import SeededDataset
from kdsr.prepare.pair_writer import write_lmdb
from kdsr.runtime.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images in separate folders, one of them grey, and a file that is not an image."""
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for name, shape in {"a/one.png": (40, 50, 3), "b/two.jpg": (36, 37)}.items():
        (root / name).parent.mkdir(parents=True)
        cv2.imwrite(str(root / name), rng.integers(0, 256, shape, np.uint8))
    (root / "a" / "notes.txt").write_text("no image")
    return root


def options(root: Path, phase: str = "train", **changes: Any) -> dict[str, Any]:
    named = {"name": "images", "type": "ImageFolderDataset", "dataroot_gt": str(root), "phase": phase}
    return named | {"gt_size": 32} | changes


def test_training_crops(folder: Path) -> None:
    dataset = SeededDataset(build_dataset(options(folder)), 1)
    assert len(dataset) == 2
    items = [dataset[0, position] for position in range(8)]
    for item in items:
        assert item["gt"].shape == (3, 32, 32) and item["gt"].dtype == torch.float32
        assert torch.equal(item["gt"], item["lq"]) and item["gt_path"] == item["lq_path"]
        assert item["gt"].min() >= 0 and item["gt"].max() <= 1
    assert len({item["gt"].numpy().tobytes() for item in items}) == 8
    assert torch.equal(items[3]["gt"], dataset[0, 3]["gt"])


def test_a_crop_is_a_part_of_the_image(folder: Path) -> None:
    dataset = SeededDataset(build_dataset(options(folder, use_hflip=False, use_rot=False)), 0)
    image = cv2.imread(str(folder / "a" / "one.png"))[..., ::-1]  # RGB
    crop = np.round(dataset[0, 0]["gt"].numpy().transpose(1, 2, 0) * 255)
    places = [
        (top, left) for top in range(9) for left in range(19)
        if (image[top : top + 32, left : left + 32] == crop).all()
    ]  # fmt: skip
    assert len(places) == 1


def test_validation_is_the_whole_image(folder: Path) -> None:
    dataset = build_dataset(options(folder, "val", multiple_of=16))
    assert [tuple(dataset[index]["gt"].shape) for index in range(2)] == [(3, 32, 48), (3, 32, 32)]
    whole = build_dataset(options(folder, "val"))
    assert [tuple(whole[index]["gt"].shape) for index in range(2)] == [(3, 40, 50), (3, 36, 37)]


def test_lmdb(folder: Path, tmp_path: Path) -> None:
    write_lmdb(folder / "a", tmp_path / "one.lmdb", {"one": (40, 50, 3)})
    from_lmdb = SeededDataset(build_dataset(options(tmp_path / "one.lmdb")), 0)
    from_disk = SeededDataset(build_dataset(options(folder / "a")), 0)
    assert torch.equal(from_lmdb[0, 5]["gt"], from_disk[0, 5]["gt"])


def test_bad_input_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gt_size 38 is larger than the image .*two.jpg"):
        SeededDataset(build_dataset(options(folder, gt_size=38)), 0)[0, 1]
    with pytest.raises(DataError, match="two.jpg is smaller than multiple_of"):
        build_dataset(options(folder, "val", multiple_of=40))[1]
    (folder / "a" / "one.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="Cannot read image .*one.png"):
        build_dataset(options(folder))[0]
    (tmp_path / "empty").mkdir()
    for root in ("empty", "absent"):
        with pytest.raises(DataError, match=root):
            build_dataset(options(tmp_path / root))
