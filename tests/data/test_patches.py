"""Training patches as whole numbers, and cache: ram: the samples are those of BasicSR's data sets, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import basicsr.data.paired_image_dataset
import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from torch.utils.data import DataLoader

from kdsr.data import image_files
from kdsr.data.patches import IMAGES, collate, to_device
from kdsr.data.samplers import PositionSampler
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.pipeline.run_data import make_dataset
from kdsr.runtime.errors import DataError
from pair_sets import Options

CPU = torch.device("cpu")
SETTINGS = [{}, {"cache": "ram"}, {"cache": "ram", "flips_on_device": True}, {"flips_on_device": True}]


def rewrite(opt: dict[str, Any], kind: str) -> None:
    """Replaces the images of a set by images of another kind."""
    for role in ("dataroot_gt", "dataroot_lq"):
        for number, path in enumerate(sorted(Path(opt[role]).iterdir())):
            old = cv2.imread(str(path))
            rng = np.random.default_rng(number)
            deep = kind == "16 bits" or (kind == "mixed" and number % 2)
            shape = old.shape[:2] if kind == "grey" else old.shape
            values = rng.integers(0, 65536 if deep else 256, shape)
            cv2.imwrite(str(path), values.astype(np.uint16 if deep else np.uint8))


def made(opt: dict[str, Any]) -> SeededDataset:
    """The training set as a run makes it."""
    dataset = make_dataset("train", opt, 1)
    if opt.get("cache"):
        dataset.fill_cache()
    return dataset


def epochs(dataset: SeededDataset, workers: int = 0, count: int = 1) -> list[dict[str, Any]]:
    """The batches of some epochs as the loader gives them, with the dataset enlarged by 3."""
    sampler = PositionSampler(dataset, 1, 0, 3)
    loader: Any = DataLoader(
        dataset, 4, sampler=sampler, num_workers=workers, drop_last=True, collate_fn=collate,
        persistent_workers=workers > 0,
    )  # fmt: skip
    found = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        found += list(loader)
    return found


@pytest.fixture
def same(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Compares all settings with the class that BasicSR or kdsr registers, on one set."""
    monkeypatch.setattr(
        basicsr.data.paired_image_dataset, "imfrombytes", image_files.imfrombytes
    )  # the seam's

    def compare(opt: dict[str, Any], settings: list[dict[str, Any]], workers: int = 0) -> None:
        expected = epochs(SeededDataset(build_dataset(opt), 1), workers)
        for setting in settings:
            found = epochs(made(opt | setting), workers)
            assert len(found) == len(expected) > 1
            for ours, theirs in zip(found, expected, strict=True):
                to_device(ours, CPU)
                assert ours.keys() == theirs.keys()
                for key in theirs.keys() & set(IMAGES):
                    assert ours[key].dtype == torch.float32
                    assert torch.equal(ours[key], theirs[key]), (setting, key)
                    assert ours[key].stride() == theirs[key].stride()  # convolutions round by it
                assert all(ours[key] == theirs[key] for key in theirs.keys() - set(IMAGES))

    return compare


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "mixed", "grey"])
def test_samples_of_every_depth(pairs: Options, kind: str, same: Callable[..., None]) -> None:
    opt = pairs()
    rewrite(opt, kind)
    same(opt, SETTINGS)


@pytest.mark.parametrize("more", [{"color": "y"}, {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}])
def test_samples_that_become_floats_in_the_worker(
    pairs: Options, more: dict[str, Any], same: Callable[..., None]
) -> None:
    same(pairs(**more), SETTINGS)


@pytest.mark.parametrize("backend", ["disk", "lmdb"])
def test_samples_of_workers(pairs: Options, backend: str, same: Callable[..., None]) -> None:
    same(pairs(backend), SETTINGS, workers=2)


@pytest.mark.parametrize(
    "options",
    [
        {"type": "ImageFolderDataset", "gt_size": 12},
        {"type": "LQImageDataset", "gt_size": 12},
        {"type": "Dataset_PairedImage", "gt_size": 28},  # larger than the images
        {"type": "Dataset_GaussianDenoising", "gt_size": 28, "sigma_type": "constant", "sigma_range": 25, "in_ch": 1},
    ],
    ids=lambda options: options["type"],
)  # fmt: skip
def test_samples_of_our_own_sets(pairs: Options, options: dict[str, Any], same: Callable[..., None]) -> None:
    same(pairs() | options, SETTINGS[:2])


def test_whites_between_the_depths(pairs: Options, same: Callable[..., None]) -> None:
    """Half of the images are PGMs with other largest values, which no depth tells."""
    opt = pairs()
    for role in ("dataroot_gt", "dataroot_lq"):
        for number, path in enumerate(sorted(Path(opt[role]).iterdir())[::2]):
            height, width = cv2.imread(str(path)).shape[:2]
            white = (100, 1000, 65535)[number]
            values = np.random.default_rng(number).integers(0, white + 1, (height, width))
            content = values.astype("u1" if white < 256 else ">u2").tobytes()
            path.write_bytes(f"P5 {width} {height} {white}\n".encode() + content)
    same(opt, SETTINGS)


def test_every_file_is_decoded_once(pairs: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of three passes by two workers; a file counts, for the workers are processes."""
    decode, log = image_files.decode, tmp_path / "decoded.txt"

    def counted(content: bytes, flags: int, name: str) -> Any:
        with log.open("a") as file:
            print(name, file=file)
        return decode(content, flags, name)

    monkeypatch.setattr(image_files, "decode", counted)
    assert len(epochs(made(pairs(cache="ram")), workers=2, count=3)) == 9
    files = sorted(str(path) for folder in ("GT", "LQ") for path in (tmp_path / folder).iterdir())
    assert sorted(log.read_text().splitlines()) == files
    log.unlink()
    epochs(made(pairs()), workers=2, count=3)
    assert len(log.read_text().splitlines()) == 2 * 9 * 4


@pytest.mark.parametrize(("kind", "width"), [("8 bits", 1), ("16 bits", 2)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_bytes_that_cross_to_the_device(
    pairs: Options, kind: str, width: int, setting: dict[str, Any]
) -> None:
    opt = pairs(**setting)
    rewrite(opt, kind)
    batch = epochs(made(opt))[0]
    crossing = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
    flips = 3 * 4 if setting.get("flips_on_device") else 0
    assert crossing == width * 4 * 3 * (8 * 8 + 4 * 4) + flips  # a quarter or a half of float32


def test_the_cache_is_shared_and_stays_as_it_is(pairs: Options) -> None:
    dataset = made(pairs(cache="ram"))
    blocks = dataset.cache._blocks
    assert all(block.is_shared() for block in blocks)
    before = [block.clone() for block in blocks]
    epochs(dataset, workers=2, count=2)
    epochs(dataset)
    assert all(map(torch.equal, before, blocks))
    with pytest.raises(ValueError, match="read-only"):
        dataset.cache.get("gt", dataset.paths[0]["gt_path"]).values[:] = 0


def test_many_blocks(pairs: Options, monkeypatch: pytest.MonkeyPatch, same: Callable[..., None]) -> None:
    monkeypatch.setattr("kdsr.data.ram_cache._BLOCK", 3000)
    opt = pairs()
    rewrite(opt, "mixed")
    assert len(made(opt | {"cache": "ram"}).cache._blocks) > 2
    same(opt, [{"cache": "ram"}])


def test_the_size_by_headers_is_that_of_the_cache(pairs: Options) -> None:
    for backend in ("disk", "lmdb"):
        opt = pairs(backend, cache="ram")
        if backend == "disk":
            rewrite(opt, "mixed")
        dataset = made(opt)
        assert dataset.decoded_bytes() == dataset.cache.nbytes
        rewrite(pairs(), "8 bits")


def test_a_spawned_worker_shares_the_cache(pairs: Options) -> None:
    dataset = made(pairs(cache="ram"))
    expected = dataset[0, 3]["gt"]
    for block in dataset.cache._blocks:
        block.zero_()  # a copy made now would be empty
    loader: Any = DataLoader(dataset, None, sampler=[(0, 3)], num_workers=1, multiprocessing_context="spawn")
    batches = iter(loader)
    found = next(batches)["gt"]
    assert expected.any() and not found.any()
    del batches


def test_an_unreadable_image_stops_the_start_or_is_replaced(pairs: Options, tmp_path: Path) -> None:
    opt = pairs(cache="ram", on_bad_image="skip")
    (tmp_path / "GT" / "im2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=f"Cannot read image {tmp_path}/GT/im2.png: it is damaged"):
        made(opt | {"on_bad_image": "stop"})
    dataset = made(opt)
    assert len(dataset.cache) == 9
    assert [dataset[0, position]["replaced"] for position in range(5)] == [
        str(tmp_path / "GT" / "im2.png") if position == 2 else "" for position in range(5)
    ]


def test_less_memory_than_its_headers_promised(pairs: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdsr.data.ram_cache.free_shared_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"datasets\.train\.cache: .* remove cache: ram"):
        made(pairs(cache="ram"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_a_gpu_gives_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    values = torch.arange(65536).reshape(4, 1, 128, 128).to(dtype)
    flips = torch.tensor([[False] * 3, [True, False, False], [True, False, True], [True, True, True]])
    batch = {"lq": values, "gt": values.float(), "flips": flips}
    here, there = to_device(dict(batch), CPU), to_device(dict(batch), torch.device("cuda"))
    for key in IMAGES:
        assert there[key].is_cuda and torch.equal(there[key].cpu(), here[key])
