"""Hostile files of torch.save: a CheckpointError or a correct load, and no code runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdsr.runtime.checkpoint import read_checkpoint, select_weights
from kdsr.runtime.errors import CheckpointError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


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


def with_pickle(path: Path, data: bytes, **kwargs: Any) -> None:
    """A zip like torch.save's, with other pickled bytes."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for record in old.infolist():
            content = data if record.filename.endswith("data.pkl") else old.read(record)
            new.writestr(record.filename, content, **kwargs)


def zipped(path: Path, data: bytes) -> None:
    with_pickle(path, data)


def plain(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def legacy(path: Path, data: bytes) -> None:
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + data + pickle.dumps([], 2))


# Each makes a file (`open(target, "w")`, `os.mkdir`, ...) under pickle.loads; {0} is the file's name.
def calls(target: Path) -> dict[str, bytes]:
    name = str(target).encode()
    text = b"V" + name + b"\n"  # protocol 0's text
    short = b"\x8c" + bytes([len(name)]) + name
    make = b"import os; os.mkdir(%r)" % str(target)
    return {
        "GLOBAL, REDUCE": b"\x80\x02cos\nmkdir\n(" + text + b"tR.",
        "GLOBAL of builtins": b"\x80\x02c__builtin__\nexec\n(V" + make + b"\ntR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + short + b"\x85R.",
        "STACK_GLOBAL from the memo": b"\x80\x04\x8c\x02os\x94\x8c\x05mkdir\x94\x8c\x04fill0h\x00h\x01\x93" + short
        + b"\x85R.",
        "INST": b"(" + text + b"ios\nmkdir\n.",
        "OBJ": b"\x80\x02(cos\nmkdir\n" + text + b"o.",
        "BUILD": b"\x80\x02}(V__setstate__\ncos\nmkdir\nu" + b"0" + b"cos\nmkdir\n" + text + b"\x85R}b.",
        "inside a dict": b"\x80\x02}(X\x06\x00\x00\x00paramscos\nmkdir\n" + text + b"\x85Ru.",
        "in a key": b"\x80\x02}(cos\nmkdir\n" + text + b"\x85RK\x01u.",
        "in a name of a storage": b"\x80\x02((X\x07\x00\x00\x00storagecos\nmkdir\n" + text + b"\x85RtQ.",
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".state", ".ckpt"])
@pytest.mark.parametrize("write", [zipped, plain, legacy])
@pytest.mark.parametrize("kind", calls(Path("x")))
def test_no_opcode_runs_code(tmp_path: Path, kind: str, write: Callable[..., None], suffix: str) -> None:
    target, path = tmp_path / "ran", tmp_path / f"bad{suffix}"
    data = calls(target)[kind]
    write(path, data)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert not target.exists()
    message = str(caught.value)
    named = "exec" if "builtins" in kind else "os.mkdir"
    assert str(path) in message and named in message and "refused" in message and "\n" not in message
    with pytest.raises(Exception) if kind == "in a name of a storage" else _nothing():
        pickle.loads(data)  # the trap is a real one
    assert target.exists()


class _nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> bool:
        return kind is not None  # some make the folder and stumble over what comes next


def test_extension_codes_and_torchs_own_functions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    zipped(path, b"\x80\x02\x82\x01.")
    with pytest.raises(CheckpointError, match="refused.*copyreg extension 1"):
        read_checkpoint(path)
    zipped(path, b"\x80\x02ctorch.hub\nload\n(X\x01\x00\x00\x00xtR.")
    with pytest.raises(CheckpointError, match="refused.*torch.hub.load"):
        read_checkpoint(path)


def test_allowlist_does_not_reach_what_torch_allows_elsewhere(tmp_path: Path) -> None:
    """The environment variable that disables torch.load's safety has no effect."""
    path, target = tmp_path / "bad.pth", tmp_path / "ran"
    zipped(path, calls(target)["GLOBAL, REDUCE"])
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with pytest.raises(CheckpointError, match="refused"):
            read_checkpoint(path)
    finally:
        del os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]
    assert not target.exists()


def test_tar_of_the_oldest_torch(tmp_path: Path) -> None:
    path, target = tmp_path / "old.pth", tmp_path / "ran"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = calls(target)["GLOBAL, REDUCE"]
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with pytest.raises(CheckpointError, match="old.pth: cannot be read"):
        read_checkpoint(path)
    assert not target.exists()


def test_torchscript_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pth"
    torch.jit.save(torch.jit.trace(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4)), str(path))
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(path)


# ------------------------------------------------------------------------------------------------ sizes


def test_text_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "text.pth"
    path.write_text("hello", encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"text\.pth: cannot be read as a torch checkpoint.*\([A-Za-z]+\)$"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_record_that_unpacks_to_more_than_the_file(tmp_path: Path, record: str) -> None:
    source, path = tmp_path / "net.pth", tmp_path / "bomb.pth"
    torch.save({"a": torch.zeros(4)}, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            bomb = entry.filename.endswith(record)
            new.writestr(entry.filename, bytes(2**27) if bomb else old.read(entry))
    assert path.stat().st_size < 2**18
    with pytest.raises(CheckpointError, match="bomb.pth: cannot be read.*compressed"):
        read_checkpoint(path)


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
@pytest.mark.parametrize("claimed", [2**31, 2**32 - 2, 2**42])
def test_record_that_claims_more_than_the_file(tmp_path: Path, record: str, claimed: int) -> None:
    path = tmp_path / "net.pth"
    torch.save({"a": torch.zeros(4)}, path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith(record))
        start = archive.start_dir
    at = data.index(entry.filename.encode(), start) - 46  # its entry in the central directory
    stated = min(claimed, 2**32 - 1)
    data[at + 20 : at + 28] = struct.pack("<II", stated, stated)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="net.pth: cannot be read"):
        read_checkpoint(path)


def storage(kind: str, numel: int) -> bytes:
    """Opcodes that push storage 0 of a zip with a claimed number of elements."""
    number = pickle.dumps(numel, 2)[2:-1]
    return (
        b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + number + b"tQ"
    )  # fmt: skip


def tensor(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    parts = b"".join(pickle.dumps(part, 2)[2:-1].replace(b"q\x00", b"") for part in (offset, size, stride))
    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + storage("FloatStorage", numel)
        + parts + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


@pytest.mark.parametrize(
    "numel, offset, size, stride",
    [
        (4, 0, (4,), (1,)),  # the sound one
        (4, 0, (10**13,), (1,)),
        (4, 0, (2**40, 2**40), (2**40, 1)),
        (4, 0, (2**62, 4), (4, 1)),
        (4, 2**62, (4,), (1,)),
        (4, -1, (4,), (1,)),
        (4, 0, (-4,), (1,)),
        (4, 0, (4,), (-1,)),
        (4, 0, (4,), (2**62,)),
        (4, 0, (3, 2**20), (2**20, 1)),
        (2**62, 0, (4,), (1,)),
        (2**61 + 1, 0, (4,), (1,)),
        (-4, 0, (4,), (1,)),
        (10**13, 0, (10**13,), (1,)),
    ],
)
def test_tensor_that_states_what_the_file_does_not_hold(
    tmp_path: Path, numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    path = tmp_path / "net.pth"
    zipped(path, tensor(numel, offset, size, stride))
    if (numel, offset, size, stride) == (4, 0, (4,), (1,)):
        assert torch.equal(read_checkpoint(path)["a"], torch.zeros(4))
        return
    with pytest.raises(CheckpointError, match="net.pth: cannot be read"):
        read_checkpoint(path)


def test_expanded_tensor_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"a": torch.arange(3.0).expand(1000, 1000, 3)}, path)
    assert torch.equal(read_checkpoint(path)["a"][7, 9], torch.arange(3.0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "csr", "meta", "quantized"])
def test_tensor_that_no_network_can_take(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "net.pth"
    odd = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "csr": lambda: torch.eye(3).to_sparse_csr(),
        "meta": lambda: torch.empty(3, device="meta"),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }[kind]()
    torch.save({"params": {"0.weight": odd}}, path)
    with pytest.raises(CheckpointError, match="net.pth: cannot be read"):
        read_checkpoint(path)


def test_pickle_that_asks_for_terabytes(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    zipped(path, b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R.")
    with pytest.raises(CheckpointError, match="refused.*bytearray"):
        read_checkpoint(path)


def test_pickle_of_references_to_references(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    tree: Any = torch.zeros(2)
    for _ in range(200):
        tree = [tree, tree]
    torch.save({"a": tree}, path)
    again = read_checkpoint(path)["a"]
    assert again[0] is again[1]
    circle: list[Any] = []
    circle.append(circle)
    torch.save({"a": circle}, path)
    with pytest.raises(CheckpointError, match="contains itself"):
        read_checkpoint(path)


def test_very_deep_pickle(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    zipped(path, b"\x80\x02" + b"]" * 20000 + b"a" * 19999 + b".")
    with pytest.raises(CheckpointError, match="net.pth: "):
        read_checkpoint(path)
    zipped(path, b"\x80\x02}K\x01" + b"]" * 20000 + b"a" * 19999 + b"s.")
    with pytest.raises(CheckpointError, match="net.pth: cannot be read"):
        read_checkpoint(path)


def test_attributes_of_an_unpickled_dict_are_ignored(tmp_path: Path) -> None:
    path, source = tmp_path / "net.pth", tmp_path / "source.pth"
    weights = OrderedDict(a=torch.zeros(4))
    weights.__dict__.update(itemz=3, keyz="none", get=None)
    torch.save(weights, source)
    with zipfile.ZipFile(source) as archive:
        data = archive.read("source/data.pkl").replace(b"itemz", b"items").replace(b"keyz", b"keys")
    zipped(path, data)
    assert vars(torch.load(path, weights_only=True))["items"] == 3
    checkpoint = read_checkpoint(path)
    assert type(checkpoint) is dict
    assert same(select_weights(checkpoint, None, path, "path.pretrain_network_g"), {"a": torch.zeros(4)})
