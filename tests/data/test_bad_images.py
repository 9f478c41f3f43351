"""Bad images and damaged LMDBs in SeededDataset: reported, or replaced with on_bad_image: skip."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from basicsr.data import build_dataset

from kdsr.data.image_files import UnreadableImage, cannot_read
from kdsr.data.samplers import PositionSampler
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.runtime.errors import DataError
from pair_sets import SCALE, Options, batches, loader, write_pair


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
def test_errors_that_are_not_of_an_image_are_not_skipped(code: int) -> None:
    assert type(cannot_read("x.png", OSError(code, os.strerror(code)))) is DataError
    assert type(cannot_read("x.png", OSError(errno.ENOENT, "gone"))) is UnreadableImage


def test_image_with_too_many_pixels(pairs: Options, tmp_path: Path) -> None:
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
    """Reading past the end of a memory-mapped file would crash with SIGBUS."""
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
