"""SeededDataset: items by (seed, epoch, position), and errors that name the file."""

from __future__ import annotations

import errno
import os
import pickle
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.utils.lmdb_util import make_lmdb_from_imgs

from kdsr.data.image_files import UnreadableImage, cannot_read
from kdsr.data.samplers import PositionSampler
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.runtime.errors import DataError

Options = Callable[..., dict[str, Any]]
SCALE = 2


def write_pair(root: Path, name: str, gt: tuple[int, int], lq: tuple[int, int], value: int) -> None:
    """Writes a GT/LQ pair of noise, so that every crop is its own."""
    rng = np.random.default_rng(value)
    for folder, size in (("GT", gt), ("LQ", lq)):
        (root / folder).mkdir(exist_ok=True)
        cv2.imwrite(str(root / folder / f"{name}.png"), rng.integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture
def pairs(tmp_path: Path) -> Options:
    """Options of a paired set of five images of 24x32 at scale 2."""
    for number in range(5):
        write_pair(tmp_path, f"im{number}", (24, 32), (12, 16), number)

    def options(backend: str = "disk", phase: str = "train", **changes: Any) -> dict[str, Any]:
        suffix = ""
        if backend == "lmdb":
            suffix = ".lmdb"
            for folder in ("GT", "LQ"):
                if not (tmp_path / f"{folder}.lmdb").exists():
                    names = sorted(path.name for path in (tmp_path / folder).iterdir())
                    make_lmdb_from_imgs(
                        str(tmp_path / folder), str(tmp_path / f"{folder}.lmdb"), names,
                        [name.split(".")[0] for name in names], map_size=2**20,
                    )  # fmt: skip
        return {
            "name": "pairs", "type": "PairedImageDataset", "phase": phase, "scale": SCALE,
            "dataroot_gt": str(tmp_path / f"GT{suffix}"), "dataroot_lq": str(tmp_path / f"LQ{suffix}"),
            "io_backend": {"type": backend}, "gt_size": 8, "use_hflip": True, "use_rot": True,
            "num_worker_per_gpu": 0, "batch_size_per_gpu": 4,
        } | changes  # fmt: skip

    return options


def loader(opt: dict[str, Any], seed: int = 1, epoch: int = 0, ratio: int = 3) -> Any:
    dataset = SeededDataset(build_dataset(opt), seed)
    sampler = PositionSampler(dataset, 1, 0, ratio)
    sampler.set_epoch(epoch)
    return build_dataloader(dataset, opt, num_gpu=0, sampler=sampler, seed=seed)


def batches(opt: dict[str, Any], **kwargs: Any) -> list[torch.Tensor]:
    return [torch.cat([b["gt"].flatten(1), b["lq"].flatten(1)], dim=1) for b in loader(opt, **kwargs)]


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


def test_loading_leaves_the_global_generators_alone(pairs: Options) -> None:
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
    """BasicSR opens it twice, which lmdb refuses within a process; workers of both open their own."""
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


def test_a_defect_of_the_program_is_not_called_bad_data(pairs: Options) -> None:
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


# ------------------------------------------------------------------------------------------- on_bad_image


def spoil(opt: dict[str, Any], tmp_path: Path, **damage: str) -> None:
    """Damages images by name (``im1="GT"``): half an image on disk, rubbish or no key in the LMDB."""
    for number, (name, folder) in enumerate(damage.items()):
        file = tmp_path / folder / f"{name}.png"
        if opt["io_backend"]["type"] == "disk":
            file.write_bytes(file.read_bytes()[: 400 * (number % 2)])
            continue
        with lmdb.open(f"{tmp_path}/{folder}.lmdb", map_size=2**20) as env, env.begin(write=True) as writing:
            if number % 2:
                writing.put(name.encode(), b"rubbish")
            else:
                writing.delete(name.encode())


@pytest.mark.parametrize("backend", ["disk", "lmdb"])
def test_unreadable_images_are_replaced_by_the_next_position(
    pairs: Options, tmp_path: Path, backend: str
) -> None:
    opt = pairs(backend, on_bad_image="skip")
    before = SeededDataset(build_dataset(pairs(on_bad_image="skip")), 3)  # disk and LMDB give the same
    whole = {position: before[2, position] for position in range(15)}
    assert {item["replaced"] for item in whole.values()} == {""}
    spoil(opt, tmp_path, im1="GT", im2="LQ", im4="LQ")
    dataset = SeededDataset(build_dataset(opt), 3)
    stands_in = {1: 3, 2: 3, 4: 0}
    for position, good in whole.items():
        item, image = dataset[2, position], position % 5
        if image in stands_in:
            bad = {1: ["im1", "im2"], 2: ["im2"], 4: ["im4"]}[image]
            assert [Path(path.split(": ")[-1]).stem for path in item["replaced"].split("\n")] == bad
            assert Path(item["gt_path"]).stem == f"im{stands_in[image]}"
            # the crop and flip are those of this position, not of the one that the image was taken from
            assert not torch.equal(item["gt"], whole[stands_in[image]]["gt"])
        else:
            assert item["replaced"] == "" and torch.equal(item["gt"], good["gt"])


@pytest.mark.parametrize("backend", ["disk", "lmdb"])
def test_replacements_do_not_depend_on_workers_or_history(
    pairs: Options, tmp_path: Path, backend: str
) -> None:
    opt = pairs(backend, on_bad_image="skip")
    build_dataset(opt)
    spoil(opt, tmp_path, im0="GT", im3="LQ")
    alone = [(batch["gt"], batch["replaced"]) for batch in loader(opt)]
    assert sum(note != "" for _, notes in alone for note in notes) > 2
    for workers in (1, 3):
        shared = [(batch["gt"], batch["replaced"]) for batch in loader(opt | {"num_worker_per_gpu": workers})]
        for (ours, our_notes), (theirs, their_notes) in zip(alone, shared, strict=True):
            assert torch.equal(ours, theirs) and our_notes == their_notes
    backwards = SeededDataset(build_dataset(opt), 1)
    forwards = SeededDataset(build_dataset(opt), 1)
    items = {position: backwards[0, position] for position in reversed(range(10))}
    assert all(torch.equal(forwards[0, n]["lq"], items[n]["lq"]) for n in range(10))


def test_ranks_replace_as_one_process_does(pairs: Options, tmp_path: Path) -> None:
    opt = pairs(on_bad_image="skip")
    spoil(opt, tmp_path, im2="GT")
    dataset = SeededDataset(build_dataset(opt), 1)
    alone = [dataset[item]["lq"] for item in PositionSampler(dataset, 1, 0, 2)]
    ranks = [[dataset[item]["lq"] for item in PositionSampler(dataset, 2, rank, 2)] for rank in range(2)]
    woven = [item for both in zip(*ranks, strict=True) for item in both]
    assert len(woven) == 10 and all(torch.equal(*both) for both in zip(alone, woven, strict=True))


@pytest.mark.parametrize("backend", ["disk", "lmdb"])
@pytest.mark.parametrize("workers", [0, 2])
def test_no_readable_image_stops(pairs: Options, tmp_path: Path, backend: str, workers: int) -> None:
    opt = pairs(backend, on_bad_image="skip", num_worker_per_gpu=workers)
    build_dataset(opt)
    spoil(opt, tmp_path, **{f"im{number}": "LQ" for number in range(5)})
    with pytest.raises(DataError, match=r"all 5 training images cannot be read; the first: .*LQ.*im\d"):
        batches(opt)


def test_a_tenth_in_a_row_stops(pairs: Options, tmp_path: Path) -> None:
    opt = pairs(on_bad_image="skip")
    for number in range(5, 30):
        write_pair(tmp_path, f"im{number}", (24, 32), (12, 16), number)
    spoil(opt, tmp_path, **{f"im{number}": "GT" for number in range(10, 19)})
    names = sorted(f"im{number}" for number in range(30))
    start = names.index("im10")
    assert SeededDataset(build_dataset(opt), 0)[0, start]["replaced"].count("\n") == 8  # nine in a row
    spoil(opt, tmp_path, im19="GT")
    with pytest.raises(DataError, match="10 in a row of 30 training images cannot be read"):
        SeededDataset(build_dataset(opt), 0)[0, start]


def test_skipping_is_for_unreadable_images_only(pairs: Options, tmp_path: Path) -> None:
    opt = pairs(on_bad_image="skip")
    write_pair(tmp_path, "im2", (26, 32), (12, 16), 1)
    with pytest.raises(DataError, match="do not match scale 2"):
        SeededDataset(build_dataset(opt), 0)[0, 2]
    with pytest.raises(DataError, match="gt_size 28 is larger"):
        SeededDataset(build_dataset(opt | {"gt_size": 28}), 0)[0, 0]


def test_only_a_training_set_skips(pairs: Options, tmp_path: Path) -> None:
    opt = pairs(phase="val", on_bad_image="skip")
    (tmp_path / "GT" / "im1.png").write_bytes(b"")
    dataset = SeededDataset(build_dataset(opt), 0)
    assert "replaced" not in dataset[0]
    with pytest.raises(UnreadableImage, match="GT/im1.png"):
        dataset[1]


def test_a_set_that_stops_has_no_such_key(pairs: Options) -> None:
    for opt in (pairs(), pairs(on_bad_image="stop")):
        assert "replaced" not in SeededDataset(build_dataset(opt), 0)[0, 0]


@pytest.mark.parametrize("kind", ["SingleImageDataset", "ImageFolderDataset"])
@pytest.mark.parametrize("suffix", ["", ".lmdb"])
def test_other_sets_skip_too(pairs: Options, tmp_path: Path, kind: str, suffix: str) -> None:
    pairs("lmdb")
    backend = "lmdb" if suffix else "disk"
    opt = {
        "name": "single", "type": kind, "phase": "train", "scale": SCALE, "io_backend": {"type": backend},
        "dataroot_lq": f"{tmp_path}/LQ{suffix}", "dataroot_gt": f"{tmp_path}/LQ{suffix}", "gt_size": 8,
        "on_bad_image": "skip",
    }  # fmt: skip
    if kind == "SingleImageDataset":
        del opt["dataroot_gt"]
    spoil(opt, tmp_path, im0="LQ", im1="LQ")
    item = SeededDataset(build_dataset(opt), 0)[0, 0]
    assert Path(item["lq_path"]).stem == "im2" and item["replaced"].count("\n") == 1


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ESTALE, errno.ENOMEM])
def test_what_is_no_fault_of_an_image_is_not_skipped(code: int) -> None:
    assert type(cannot_read("x.png", OSError(code, os.strerror(code)))) is DataError
    assert type(cannot_read("x.png", OSError(errno.ENOENT, "gone"))) is UnreadableImage


def test_image_that_states_too_many_pixels(pairs: Options, tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bad = tmp_path / "GT" / "im0.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"x") + chunk(b"IEND", b""))
    with pytest.raises(UnreadableImage, match=f"Cannot read image {bad}: it is damaged"):
        SeededDataset(build_dataset(pairs()), 0)[0, 0]


# ------------------------------------------------------------------------------------------- damaged LMDBs


@pytest.mark.parametrize("phase", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_lmdb_is_named(pairs: Options, phase: str, workers: int) -> None:
    """Read past its end, a memory-mapped file ends the process with SIGBUS."""
    opt = pairs("lmdb", phase, num_worker_per_gpu=workers)
    data = Path(opt["dataroot_lq"], "data.mdb")
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        if phase == "train":
            batches(opt)
        else:
            SeededDataset(build_dataset(opt), 0)[0]
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"The LMDB {opt['dataroot_lq']} is truncated: data.mdb has {len(whole) // 2} bytes"
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["no key", "no image"])
def test_bad_value_crosses_the_worker_with_its_key(
    pairs: Options, tmp_path: Path, workers: int, damage: str
) -> None:
    opt = pairs("lmdb", num_worker_per_gpu=workers)
    with lmdb.open(opt["dataroot_lq"], map_size=2**20) as env, env.begin(write=True) as writing:
        if damage == "no key":
            writing.delete(b"im3")
        else:
            writing.put(b"im3", b"rubbish")
    with pytest.raises(UnreadableImage) as caught:
        batches(opt)
    what = "no such key in the LMDB" if damage == "no key" else "it is damaged or not an image (7 bytes)"
    assert caught.value.problems == [f"Cannot read image {opt['dataroot_lq']}: im3: {what}"]
