"""safetensors: files are read back exactly, others are refused by name."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from kdsr.runtime.checkpoint import load_weights, read_checkpoint, select_weights
from kdsr.runtime.errors import CheckpointError, TrainingError
from kdsr.runtime.safetensors_files import FlatWeights, save_safetensors

from basicsr.utils import get_root_logger  # isort: skip (after kdsr, which makes basicsr importable)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def raw(path: Path, header: Any, data: bytes = b"") -> None:
    """A file with a custom header, as a dict or as text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(start: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "net_g_8.safetensors"
    weights = network(1).state_dict() | {
        "empty": torch.zeros(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    save_safetensors(weights, path, {"weights": "params_ema", "iteration": "8"})
    again = read_checkpoint(path)
    assert isinstance(again, FlatWeights)
    assert again.metadata == {"format": "pt", "weights": "params_ema", "iteration": "8"}
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(again[name], value) and again[name].dtype == value.dtype, name
    stock = safetensors.torch.load_file(path)  # by the library's own reader too
    assert all(torch.equal(stock[name], value) for name, value in weights.items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_strides_shared_memory_and_parameters(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    base = torch.arange(24.0)
    weights = {
        "turned": base.view(4, 6).T,
        "whole": base,
        "part": base[3:7],
        "every_other": base[::2],
        "again": base,
        "expanded": torch.ones(1).expand(3),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    save_safetensors(weights, path, {})
    again = read_checkpoint(path)
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    again["whole"].zero_()
    assert torch.equal(again["again"], base), "each has its own memory"


def test_failing_write_leaves_the_file_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot be written"):
        save_safetensors({"a": torch.zeros(1)}, tmp_path / "file" / "net.safetensors", {})


@pytest.mark.parametrize("key", [None, "auto", "params", "params_ema", "state_dict"])
def test_usual_keys_mean_the_whole_file(tmp_path: Path, key: str | None) -> None:
    path = tmp_path / "net.safetensors"
    save_safetensors(network(1).state_dict(), path, {})
    net = network()
    load_weights(net, path, param_key=key)
    assert all(torch.equal(value, network(1).state_dict()[name]) for name, value in net.state_dict().items())


def test_other_weights_than_requested_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.safetensors"
    save_safetensors(network().state_dict(), path, {"weights": "params_ema"})
    monkeypatch.setattr(get_root_logger(), "propagate", True)
    with caplog.at_level("WARNING", logger="basicsr"):
        for key in ("params_ema", "auto", None):
            select_weights(read_checkpoint(path), key, path, "path.pretrain_network_t")
        assert not caplog.text
        select_weights(read_checkpoint(path), "params", path, "path.pretrain_network_t")
    assert "net.safetensors: holds params_ema" in caplog.text and "path.param_key_t: params" in caplog.text


def test_key_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_safetensors(network().state_dict(), path, {})
    with pytest.raises(CheckpointError, match="param_key_g is teacher.*bare state dict"):
        load_weights(network(), path, param_key="teacher")


def test_a_tensor_named_as_a_key(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_safetensors({"params": torch.zeros(2), "params_ema": torch.zeros(3)}, path, {})
    weights = select_weights(read_checkpoint(path), "params", path, "path.pretrain_network_g")
    assert set(weights) == {"params", "params_ema"}  # the writer sorts them


def test_recognised_by_content_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    save_safetensors(network(1).state_dict(), path, {})
    net = network()
    load_weights(net, path)
    assert torch.equal(net[0].weight, network(1)[0].weight)


@pytest.mark.parametrize("kind", ["zip", "legacy", "text", "empty"])
def test_something_else_under_this_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "net.safetensors"
    if kind in ("zip", "legacy"):
        torch.save({"params": network().state_dict()}, path, _use_new_zipfile_serialization=kind == "zip")
    else:
        path.write_text("" if kind == "empty" else "no tensors at all, only text")
    with pytest.raises(
        CheckpointError, match=f"path.pretrain_network_t: {path}: cannot be read as a safetensors"
    ):
        load_weights(network(), path, option="path.pretrain_network_t")


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    "header, data",
    [
        ({"a": entry(0, 8)}, bytes(4)),  # torn
        ({"a": entry(0, 8)}, bytes(12)),  # more than the header knows of
        ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),  # the same bytes twice
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),  # overlapping
        ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),  # a gap
        ({"a": entry(8, 0)}, bytes(8)),
        ({"a": entry(0, 7)}, bytes(7)),
        ({"a": entry(0, 8, (3,))}, bytes(8)),  # shape and bytes do not agree
        ({"a": entry(0, 8, (2**62, 2**62))}, bytes(8)),
        ({"a": entry(0, 2**63, (2**61,))}, bytes(8)),
        ({"a": entry(0, 8, (-2,))}, bytes(8)),
        ({"a": entry(0, 8, dtype="F99")}, bytes(8)),
        ({"a": entry(0, 8, dtype="__import__('os')")}, bytes(8)),
        ({"a": [1, 2]}, bytes(8)),
        ({"__metadata__": {"x": 3}, "a": entry(0, 8)}, bytes(8)),
        ({"__metadata__": [], "a": entry(0, 8)}, bytes(8)),
        ([], b""),
        (TWICE, bytes(4)),
        (b"{" * 5000, b""),
        (b'{"a": ' * 5000, b""),
        (b'{"\xff": 1}', b""),
    ],
)
def test_header_that_does_not_fit_the_file(tmp_path: Path, header: Any, data: bytes) -> None:
    path = tmp_path / "net.safetensors"
    raw(path, header, data)
    with pytest.raises(CheckpointError, match="net.safetensors: cannot be read as a safetensors file"):
        read_checkpoint(path)


@pytest.mark.parametrize("length", [10**8 + 1, 2**31, 2**40, 2**63, 2**64 - 1, 0, 3])
@pytest.mark.parametrize("name", ["net.safetensors", "net.pth"])
def test_header_of_impossible_length(tmp_path: Path, length: int, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(struct.pack("<Q", length) + b"{" + bytes(100))
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(path)


def changed(whole: bytes, draw: random.Random) -> bytes:
    at, bit = draw.randrange(len(whole)), draw.randrange(8)
    return whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]


@pytest.mark.parametrize("change", [lambda whole, draw: whole[: draw.randrange(len(whole))], changed])
def test_truncated_or_changed_anywhere(
    tmp_path: Path, change: Callable[[bytes, random.Random], bytes]
) -> None:
    path = tmp_path / "net.safetensors"
    save_safetensors(network().state_dict(), path, {"weights": "params"})
    whole = path.read_bytes()
    names = set(network().state_dict())
    draw = random.Random(4)
    refused = 0
    for _ in range(50):
        path.write_bytes(change(whole, draw))
        try:
            # the format has no checksums: a changed number or name cannot be told from a right one
            assert len(read_checkpoint(path)) == len(names)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused == 50 or change is changed and refused > 0
