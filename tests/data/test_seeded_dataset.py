"""SeededDataset: items by (seed, epoch, position), and errors that name the file."""

from __future__ import annotations

import pickle
import random
import tempfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.data.seeded_dataset import SeededDataset
from kdsr.runtime.errors import DataError
from pair_sets import SCALE, Options, batches, write_pair


@pytest.mark.parametrize("backend", ["disk", "lmdb"])
def test_batches_do_not_depend_on_workers(pairs: Options, backend: str) -> None:
    opt = pairs(backend)
    alone = batches(opt)
    assert len(alone) == 15 // 4  # drop_last
    shared = batches(opt | {"num_worker_per_gpu": 2})
    for ours, theirs in zip(alone, shared, strict=True):
        assert torch.equal(ours, theirs)


def test_disk_and_lmdb_give_the_same(pairs: Options) -> None:
    for disk, database in zip(batches(pairs()), batches(pairs("lmdb")), strict=True):
        assert torch.equal(disk, database)


def test_epochs_and_seeds_differ_and_repeat(pairs: Options) -> None:
    opt = pairs()
    first, second, third = (
        torch.cat(batches(opt, seed=seed, epoch=epoch)) for seed, epoch in ((1, 0), (1, 1), (2, 0))
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(second, torch.cat(batches(opt, seed=1, epoch=1)))


def test_occurrences_of_an_image_get_their_own_crop(pairs: Options) -> None:
    dataset = SeededDataset(build_dataset(pairs(gt_size=6)), 0)
    crops = {dataset[0, 5 * occurrence]["gt"].numpy().tobytes() for occurrence in range(8)}
    assert len(crops) == 8
    assert {dataset[0, 5 * n]["gt_path"] for n in range(8)} == {dataset[0]["gt_path"]}


def test_loading_does_not_change_the_global_generators(pairs: Options) -> None:
    dataset = SeededDataset(build_dataset(pairs()), 0)
    random.seed(5), np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5), np.random.seed(5)
    dataset[0, 3]
    assert (random.random(), np.random.rand()) == expected


def test_keeps_the_attributes_of_the_wrapped_set(pairs: Options) -> None:
    inner = build_dataset(pairs())
    dataset = SeededDataset(inner, 0)
    assert dataset.opt is inner.opt and dataset.paths is inner.paths and len(dataset) == 5
    with pytest.raises(AttributeError, match="no_such_thing"):
        dataset.no_such_thing  # noqa: B018


def test_can_be_sent_to_a_spawned_worker(pairs: Options) -> None:
    copy = pickle.loads(pickle.dumps(SeededDataset(build_dataset(pairs("lmdb")), 4)))
    from_disk = SeededDataset(build_dataset(pairs()), 4)
    assert torch.equal(copy[2, 3]["gt"], from_disk[2, 3]["gt"])
    again = pickle.loads(pickle.dumps(copy))  # with its LMDBs open
    assert torch.equal(again[2, 3]["gt"], from_disk[2, 3]["gt"])


def test_sets_share_an_lmdb(pairs: Options) -> None:
    """BasicSR opens it twice, which lmdb refuses within a process."""
    first, second = pairs("lmdb"), pairs("lmdb", num_worker_per_gpu=1)
    assert all(torch.equal(*both) for both in zip(batches(first), batches(second), strict=True))
    same = pairs("lmdb", "val", scale=1) | {"dataroot_lq": first["dataroot_gt"]}
    item = SeededDataset(build_dataset(same), 0)[0]
    assert torch.equal(item["gt"], item["lq"])


def test_damaged_lmdb_is_named(pairs: Options) -> None:
    opt = pairs("lmdb")
    Path(opt["dataroot_gt"], "data.mdb").write_bytes(b"rubbish" * 2000)
    with pytest.raises(DataError, match=r"Cannot open the LMDB .*GT.lmdb: "):
        SeededDataset(build_dataset(opt), 0)[0, 0]


def test_order_is_that_of_the_names(pairs: Options) -> None:
    inner = build_dataset(pairs(phase="val"))
    inner.paths = [inner.paths[index] for index in (3, 0, 4, 1, 2)]  # os.scandir promises no order
    dataset = SeededDataset(inner, 0)
    assert [Path(dataset[index]["gt_path"]).stem for index in range(5)] == [f"im{n}" for n in range(5)]


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image_is_named(pairs: Options, tmp_path: Path, content: bytes | None) -> None:
    dataset = SeededDataset(build_dataset(pairs(phase="val")), 0)
    bad = tmp_path / "LQ" / "im3.png"
    if content is None:
        bad.unlink()
    else:
        bad.write_bytes(content)
    with pytest.raises(DataError, match=f"Cannot read image {bad}"):
        dataset[3]


def test_truncated_image_is_named(pairs: Options, tmp_path: Path) -> None:
    bad = tmp_path / "GT" / "im1.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    with pytest.raises(DataError, match=f"Cannot read image {bad}: it is damaged"):
        SeededDataset(build_dataset(pairs()), 0)[0, 1]


def test_unreadable_image_in_an_lmdb_is_named(pairs: Options, tmp_path: Path) -> None:
    opt = pairs("lmdb")
    with lmdb.open(opt["dataroot_gt"], map_size=2**20) as env, env.begin(write=True) as transaction:
        transaction.put(b"im2", b"rubbish")
        transaction.delete(b"im4")
    dataset = SeededDataset(build_dataset(opt), 0)
    with pytest.raises(DataError, match=r"GT\.lmdb: im2.* damaged"):
        dataset[0, 2]
    with pytest.raises(DataError, match=r"GT\.lmdb: im4.* no such key"):
        dataset[0, 4]


def test_error_survives_a_worker(pairs: Options, tmp_path: Path) -> None:
    bad = tmp_path / "GT" / "im1.png"
    bad.write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        batches(pairs(num_worker_per_gpu=2))
    assert caught.value.problems == [f"Cannot read image {bad}: it is damaged or not an image (8 bytes)"]


@pytest.mark.parametrize("backend", ["disk", "lmdb"])
@pytest.mark.parametrize(
    ("phase", "gt", "accepted"),
    [
        ("train", (24, 33), False),  # BasicSR refuses, without naming the file
        ("val", (25, 33), True),  # the usual mod-crop case
        ("val", (26, 32), False),  # BasicSR crops silently
        ("val", (24, 31), False),
    ],
)
def test_gt_and_lq_must_match_the_scale(
    pairs: Options, tmp_path: Path, backend: str, phase: str, gt: tuple[int, int], accepted: bool
) -> None:
    write_pair(tmp_path, "im2", gt, (12, 16), 7)
    dataset = SeededDataset(build_dataset(pairs(backend, phase)), 0)
    item = (0, 2) if phase == "train" else 2
    if accepted:
        assert dataset[item]["gt"].shape == (3, 24, 32)
        return
    with pytest.raises(DataError, match=rf"do not match scale 2: .*im2.* is {gt[0]}x{gt[1]} .* is 12x16"):
        dataset[item]


def test_patch_larger_than_the_image(pairs: Options, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"gt_size 28 .*{tmp_path}/GT/im0.png \(24x32\)"):
        SeededDataset(build_dataset(pairs(gt_size=28)), 0)[0, 0]


def test_a_bug_is_not_reported_as_bad_data(pairs: Options) -> None:
    opt = pairs()
    del opt["use_rot"]
    with pytest.raises(KeyError, match="use_rot"):
        SeededDataset(build_dataset(opt), 0)[0, 0]


def test_set_without_gt(pairs: Options, tmp_path: Path) -> None:
    opt = {
        "name": "single", "type": "SingleImageDataset", "phase": "test", "scale": SCALE,
        "dataroot_lq": str(tmp_path / "LQ"), "io_backend": {"type": "disk"},
    }  # fmt: skip
    dataset = SeededDataset(build_dataset(opt), 0)
    assert dataset[0]["lq"].shape == (3, 12, 16)
    (tmp_path / "LQ" / "im1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="LQ/im1.png"):
        dataset[1]


SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(SIZES)
def test_the_smallest_has_the_shortest_side(sizes: list[tuple[int, int]]) -> None:
    """The first of equal ones."""
    with tempfile.TemporaryDirectory() as folder:
        for index, (height, width) in enumerate(sizes):
            write_pair(Path(folder), str(index), (height * SCALE, width * SCALE), (height, width), index)
        opt = {
            "name": "set", "type": "PairedImageDataset", "phase": "val", "scale": SCALE, "io_backend": {"type": "disk"},
            "dataroot_gt": f"{folder}/GT", "dataroot_lq": f"{folder}/LQ",
        }  # fmt: skip
        found = SeededDataset(build_dataset(opt)).smallest()
    assert found == min(range(len(sizes)), key=lambda index: (min(sizes[index]), max(sizes[index])))


@pytest.mark.parametrize("backend", ["disk", "lmdb"])
def test_the_smallest_is_found_on_disk_and_in_lmdb(pairs: Options, tmp_path: Path, backend: str) -> None:
    pairs()
    write_pair(tmp_path, "im3", (12, 40), (6, 20), 3)
    assert SeededDataset(build_dataset(pairs(backend, "val"))).smallest() == 3


def test_a_set_whose_sizes_are_not_known_has_its_first_image() -> None:
    class Foreign(torch.utils.data.Dataset):
        paths = [["a", "b"], ["c", "d"]]  # noqa: RUF012  folders of frames, say

        def __len__(self) -> int:
            return 2

    assert SeededDataset(Foreign()).smallest() == 0
