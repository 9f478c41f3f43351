"""Damaged files of torch.save: a CheckpointError or a correct load."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdsr.runtime.checkpoint import read_checkpoint, save_file, select_weights
from kdsr.runtime.errors import CheckpointError

TIMES = 50


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def state() -> dict[str, Any]:
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {
        "iter": 7,
        "optimizers": [optimizer.state_dict()],
        "networks": {"net_g": net.state_dict()},
        "generators": [{"torch": torch.get_rng_state()}],
        "best_metric_results": {"set": {"psnr": {"better": "higher", "val": 31.5, "iter": 7}}},
    }


def same(first: Any, second: Any) -> bool:
    """Bitwise equal trees."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return isinstance(second, dict) and first.keys() == second.keys() and all(
            same(value, second[key]) for key, value in first.items()
        )  # fmt: skip
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


def save_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def read_or_refuse(path: Path) -> Any:
    """The file's content, or None if it is refused; any other exception fails the test."""
    try:
        checkpoint = read_checkpoint(path)
        if "params" in checkpoint:
            select_weights(checkpoint, "params", path, "path.pretrain_network_g")
        return checkpoint
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None


@pytest.mark.parametrize("suffix", [".pth", ".state", ".ckpt"])
@pytest.mark.parametrize("write", [save_file, save_legacy])
def test_truncated_anywhere(tmp_path: Path, write: Callable[..., None], suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    write(state() if suffix == ".state" else {"params": network().state_dict()}, path)
    whole = path.read_bytes()
    draw = random.Random(1)
    for length in [0, 1, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(TIMES))]:
        path.write_bytes(whole[:length])
        assert read_or_refuse(path) is None, length


@pytest.mark.parametrize("suffix", [".pth", ".state", ".ckpt"])
@pytest.mark.parametrize("write", [save_file, save_legacy])
def test_a_flipped_bit_anywhere(tmp_path: Path, write: Callable[..., None], suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    content = state() if suffix == ".state" else {"params": network().state_dict()}
    write(content, path)
    whole = path.read_bytes()
    draw = random.Random(2)
    refused = 0
    for _ in range(TIMES):
        at, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        found = read_or_refuse(path)
        refused += found is None
        # the older kind has no checksums: a changed number there cannot be told from a right one
        assert found is None or write is save_legacy or same(content, found), (at, bit)
    assert refused > 0


@pytest.mark.parametrize("write", [save_file, save_legacy])
def test_random_bytes(tmp_path: Path, write: Callable[..., None]) -> None:
    """Ranges overwritten, removed or doubled, and random files."""
    path = tmp_path / "file.pth"
    write({"params": network().state_dict()}, path)
    whole = path.read_bytes()
    draw = random.Random(3)
    for _ in range(TIMES):
        first, second = sorted(draw.randrange(len(whole)) for _ in range(2))
        noise = draw.randbytes(draw.randrange(1, 40))
        for changed in (whole[:first] + noise + whole[first:], whole[:first] + whole[second:], noise):
            path.write_bytes(changed)
            read_or_refuse(path)


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    save_file({"params": {"a": torch.full((1000,), 0.5)}}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((8,), 0.5).numpy().tobytes()) + 2001] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["params"]["a"].shape == (1000,), "torch.load does not see it"
    with pytest.raises(CheckpointError, match="net.pth: cannot be read.*CRC"):
        read_checkpoint(path)


def test_file_written_without_checksums(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"params": network().state_dict()}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_checkpoint(path), {"params": dict(network().state_dict())})


@pytest.mark.parametrize("suffix", [".pth", ".state", ".ckpt", ".safetensors"])
def test_folder_pipe_empty_file_and_impossible_name(tmp_path: Path, suffix: str) -> None:
    for name, make in (("folder", Path.mkdir), ("empty", Path.touch), ("pipe", os.mkfifo)):
        path = tmp_path / f"{name}{suffix}"
        make(path)
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(path)
    for name in ("x" * 5000, "nul\0", f"empty{suffix}/below"):
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / f"{name}{suffix}")


def test_training_state_comes_back_as_it_was(tmp_path: Path) -> None:
    content = state()
    for write in (save_file, save_legacy):
        write(content, tmp_path / "7.state")
        assert same(read_checkpoint(tmp_path / "7.state"), content)
