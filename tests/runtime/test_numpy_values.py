"""numpy numbers and arrays in a checkpoint are data; other pickles of numpy are refused."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from kdsr.archs.spandrel_arch import Spandrel
from kdsr.runtime.checkpoint import load_weights, read_checkpoint
from kdsr.runtime.errors import CheckpointError
from kdsr.runtime.torch_files import _allowed_by_torch
from spandrel_files import made

TRY = settings(deadline=None, derandomize=True, max_examples=60, database=None)
KINDS = [np.dtype(code) for code in "?bBhHiIlLqQefdgFDG"]
DTYPES = st.sampled_from(KINDS + [kind.newbyteorder() for kind in KINDS if kind.itemsize > 1])
VALUES = DTYPES.flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=4))
)
OLD, NEW = b"numpy.core.multiarray", b"numpy._core.multiarray"


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the pickled bytes of a file."""
    content = path.read_bytes()
    if not zipfile.is_zipfile(path):
        path.write_bytes(change(content))
        return
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w") as new:
        for record in old.infolist():
            data = old.read(record)
            new.writestr(record.filename, change(data) if record.filename.endswith("data.pkl") else data)


def of_version(path: Path, old: bool) -> None:
    """With the function names of numpy 1 or numpy 2."""
    name, other = (OLD, NEW) if old else (NEW, OLD)
    rewritten(path, lambda pickled: pickled.replace(other, name))
    assert other not in path.read_bytes()


def refusal(pickled: bytes, path: Path) -> str:
    torch.save({"a": torch.zeros(4)}, path)
    rewritten(path, lambda _: pickled)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@TRY
@given(VALUES, st.booleans(), st.booleans(), st.booleans())
def test_numbers_and_arrays_come_back(value: np.ndarray, turned: bool, old: bool, zipped: bool) -> None:
    value = value.T if turned else value
    content = {
        "weights": {"a": torch.ones(3)},
        "array": value,
        "numbers": [*value.flat],
        "last": (value, {"b": value}),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        of_version(path, old)
        found = read_checkpoint(path)
    for array in (found["array"], found["last"][0], found["last"][1]["b"]):
        assert type(array) is np.ndarray and (array.dtype, array.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(array, value)
    python = {"b": bool, "i": int, "u": int, "f": float, "c": complex}[value.dtype.kind]
    wanted = [python(number) for number in value.flat]
    assert [type(number) for number in found["numbers"]] == [python] * value.size
    np.testing.assert_array_equal(found["numbers"], wanted)


@pytest.mark.parametrize("old", [False, True])
def test_weights_are_loaded_with_numpy_values_in_the_file(tmp_path: Path, old: bool) -> None:
    state = made("SAFMN", 1).state_dict()
    beside = {
        "best_psnr": np.float64(31.5),
        "epoch": np.int64(4),
        "improved": np.bool_(True),
        "curve": np.linspace(0, 1, 5, dtype=np.float32),
        "none yet": np.zeros((0, 3)),
        "random": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "as a dict": np.random.get_state(False),
        },
        "per class": {np.int64(3): np.float32(0.5), (np.int8(1), "a"): None},
        "raw": (b"", b"\x00\xff"),
    }
    path = tmp_path / "net.pth"
    for key, zipped in (("params", True), ("state_dict", False)):
        torch.save({key: state, **beside}, path, _use_new_zipfile_serialization=zipped)
        of_version(path, old)
        net = made("SAFMN", 2)
        load_weights(net, path, param_key=key)
        for found in (net.state_dict(), Spandrel(str(path)).state_dict()):
            assert all(torch.equal(found[name], value) for name, value in state.items())
    found = read_checkpoint(path)
    assert (found["best_psnr"], found["epoch"], found["improved"]) == (31.5, 4, True)
    assert found["per class"] == {3: 0.5, (1, "a"): None} and found["raw"] == (b"", b"\x00\xff")
    generator = np.random.RandomState()
    generator.set_state(found["random"]["numpy"])
    assert generator.random() == np.random.random()


def test_weights_that_are_arrays_stay_refused(tmp_path: Path) -> None:
    net = nn.Conv2d(3, 3, 1)
    arrayed = {name: value.numpy() for name, value in net.state_dict().items()}
    torch.save({"params": arrayed}, tmp_path / "net.pth")
    with pytest.raises(
        CheckpointError, match="params holds arrays of numpy .weight, bias., and weights must be tensors"
    ):
        load_weights(net, tmp_path / "net.pth")
    torch.save({"params": net.state_dict() | {"bias": arrayed["bias"]}}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="these are no tensors: bias"):
        load_weights(net, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="holds no weights under a key that spandrel knows"):
        Spandrel(str(tmp_path / "net.pth"))


# ------------------------------------------------------------------------------------------------ what is refused


class Intruder:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


OTHER: dict[str, tuple[Any, str]] = {
    "objects": (np.array(["a", None], dtype=object), "dtype O8"),
    "object of a scalar": (np.array("a", dtype=object), "dtype O8"),
    "text": (np.array(["a"]), "dtype U1"),
    "bytes": (np.array([b"a"]), "dtype S1"),
    "number of text": (np.str_("a"), "dtype U1"),
    "fields": (np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]), "dtype V8"),
    "record": (np.zeros(2, dtype=[("a", "f4")])[0], "dtype V4"),
    "void": (np.void(b"abc"), "dtype V3"),
    "date": (np.datetime64("2020-01-01"), "dtype M8"),
    "span": (np.array([1], dtype="m8[s]"), "dtype m8"),
    "dtype": (np.dtype("f4"), "numpy dtype that is not a number's"),
    "dtype as a key": ({np.dtype("f4"): 1}, "in a set or as a dict key"),
    "dtype in a set": ({np.dtype("f4")}, "in a set or as a dict key"),
    "class": (np.ndarray, "a class or function of numpy"),
    "class as a key": ({np.ndarray: 1}, "a class or function of numpy"),
    "class in a set": ({(np.ndarray, 1)}, "a class or function of numpy"),
    "class of numbers": (np.float64, "numpy.float64"),
    "masked": (np.ma.zeros(2), "numpy.ma.MaskedArray"),
    "recarray": (np.rec.array([(1, 2)]), "numpy.rec.recarray"),
    "generator": (np.random.default_rng(0), "numpy.random._pickle"),
    "function": (np.load, "numpy.load"),
}


@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.parametrize("zipped", [True, False])
def test_other_values_of_numpy_are_refused(tmp_path: Path, kind: str, zipped: bool) -> None:
    path = tmp_path / "net.pth"
    value, named = OTHER[kind]
    torch.save(
        {"params": {"a": torch.zeros(2)}, "more": [value]}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CheckpointError, match="net.pth: refused, it holds") as caught:
        read_checkpoint(path)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "hidden",
    [
        np.array([Intruder()], dtype=object),
        [np.float64(1), Intruder(), np.zeros(2)],
        {np.int64(1): Intruder()},
    ],
)
def test_code_among_numbers_is_refused_by_name_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"params": {"a": torch.zeros(2)}, "more": hidden}, "net.pth")
    with pytest.raises(
        CheckpointError, match="refused, it holds pickled code in addition to tensors: (posix|os).mkdir"
    ) as caught:
        read_checkpoint("net.pth")
    assert "numpy" not in str(caught.value) and not Path("executed").exists()


def pushed(value: Any) -> bytes:
    """Opcodes that push a plain value."""
    return b"".join(
        data
        for opcode, data in _instructions(pickle.dumps(value, 2))
        if opcode not in ("PROTO", "STOP", "BINPUT")
    )


def _instructions(data: bytes) -> list[tuple[str, bytes]]:
    found = [(opcode.name, place or 0) for opcode, _, place in pickletools.genops(data)]
    ends = [place for _, place in found[1:]] + [len(data)]
    return [(name, data[place:end]) for (name, place), end in zip(found, ends, strict=True)]


def called(name: bytes, *arguments: bytes) -> bytes:
    return b"c" + name + b"(" + b"".join(arguments) + b"tR"


def a_dtype(code: str = "f8", state: Any = (3, "<", None, None, None, -1, -1, 0)) -> bytes:
    return called(b"numpy\ndtype\n", pushed(code), b"\x89\x88") + (pushed(state) + b"b" if state else b"")


def encoded(text: str, encoding: str = "latin1") -> bytes:
    return called(b"_codecs\nencode\n", pushed(text), pushed(encoding))


def an_array(
    shape: Any, content: bytes, dtype: bytes | None = None, kind: bytes = b"cnumpy\nndarray\n"
) -> bytes:
    made = called(b"numpy.core.multiarray\n_reconstruct\n", kind, pushed((0,)), encoded("b"))
    return made + b"(K\x01" + pushed(shape) + (dtype or a_dtype()) + b"\x89" + content + b"tb"


def a_dict(value: bytes) -> bytes:
    return b"\x80\x02}" + pushed("a") + value + b"s."


def test_the_opcodes_below_are_read_if_valid(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"a": torch.zeros(4)}, path)
    rewritten(path, lambda _: a_dict(an_array((2,), encoded("\0" * 16))))
    np.testing.assert_array_equal(read_checkpoint(path)["a"], np.zeros(2))


EIGHT = encoded("\0" * 8)
SIZES: list[Any] = [
    (2,), (10**13,), (2**31, 2**31), (2**62, 4), (2**64 + 1,), (2**200,), (-1,), (-1, -1), (0,), (0, 2**62),
    (1,) * 65, (True,), (1.0,), ("1",), None, 1, "a", [1], {0: 1}, (None,), ((1,),),
]  # fmt: skip


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_shapes_that_do_not_match_the_bytes(tmp_path: Path, shape: Any) -> None:
    message = refusal(a_dict(an_array(shape, EIGHT)), tmp_path / "net.pth")
    assert "cannot be read" in message


HOSTILE = {
    "no content": called(b"numpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", pushed((0,)), EIGHT),
    "text as content": an_array((8,), pushed("\0" * 8), a_dtype("u1")),
    "a number as content": an_array((1,), pushed(8)),
    "a dtype as content": an_array((1,), a_dtype()),
    "a dtype without a byte order": an_array((1,), EIGHT, a_dtype(state=None)),
    "a byte order that is none": an_array((1,), EIGHT, a_dtype(state=(3, "x", None, None, None, -1, -1, 0))),
    "another class": an_array((1,), EIGHT, kind=b"ccollections\nOrderedDict\n"),
    "a class of torch": an_array((1,), EIGHT, kind=b"ctorch\nFloatStorage\n"),
    "fields behind a number": an_array(
        (1,), EIGHT, a_dtype(state=(3, "<", None, ("a",), {"a": (1, 0)}, -1, -1, 0))
    ),
    "a sub-array behind a number": an_array((1,), EIGHT, a_dtype(state=(3, "<", (1, (2**40,)), None, None, -1, -1, 0))),
    "a dtype of terabytes": an_array((1,), EIGHT, a_dtype("f9999999999999")),
    "a dtype of text": an_array((1,), EIGHT, a_dtype("U99999999")),
    "a dtype of fields as text": an_array((1,), EIGHT, a_dtype("i4,f4")),
    "a dtype that is no text": an_array((1,), EIGHT, called(b"numpy\ndtype\n", pushed(3))),
    "a dtype from a class": an_array((1,), EIGHT, called(b"numpy\ndtype\n", b"cnumpy\nndarray\n")),
    "a scalar of a tuple": called(b"numpy._core.multiarray\nscalar\n", pushed((1, 2)), EIGHT),
    "a scalar with too many bytes": called(b"numpy._core.multiarray\nscalar\n", a_dtype("f4"), EIGHT),
    "a scalar without bytes": called(b"numpy._core.multiarray\nscalar\n", a_dtype()),
    "an array by its class": called(b"numpy\nndarray\n", pushed((10**13,))),
    "an array by NEWOBJ": b"cnumpy\nndarray\n" + pushed(((10**13,),)) + b"\x81",
    "bytes of a size": called(b"__builtin__\nbytes\n", pushed(10**13)),
    "bytes in hex": encoded("00", "hex"),
    "text in idna": encoded("a", "idna"),
    "text that is not latin": encoded("\u20ac"),
    "a state of an array, twice": an_array((1,), EIGHT) + pushed((1, (10**13,), None, False, b"")) + b"b",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_pickles_that_numpy_does_not_write(tmp_path: Path, kind: str) -> None:
    refusal(a_dict(HOSTILE[kind]), tmp_path / "net.pth")


def test_bytes_do_not_multiply(tmp_path: Path) -> None:
    """A file that refers to one long text repeatedly, and one that doubles bytes by hex encoding."""
    head = b"\x80\x02](c_codecs\nencode\nq\x00" + pushed(("x" * 100_000, "latin1")) + b"q\x01"
    assert "more bytes than the file" in refusal(head + b"h\x00h\x01R" * 20_000 + b"e.", tmp_path / "net.pth")
    doubled = b"c_codecs\nencode\nh\x02" + pushed("hex") + b"\x86Rq\x02"
    head = b"\x80\x02](" + encoded("ab") + b"q\x02"
    assert "an encoding that Python does not write" in refusal(
        head + doubled * 60 + b"e.", tmp_path / "net.pth"
    )


def test_arrays_share_the_bytes_that_they_were_read_from(tmp_path: Path) -> None:
    """A thousand arrays that share memory in a small file do not need a thousand times the memory."""
    path = tmp_path / "net.pth"
    array = np.arange(100_000.0)
    torch.save({"a": [array[:]] * 1000}, path)
    found = read_checkpoint(path)["a"]
    assert all(np.shares_memory(found[0], other) for other in found)
    assert not found[0].flags.writeable


def test_torchs_list_is_restored(tmp_path: Path) -> None:
    before, user = dict(_allowed_by_torch()), set(torch.serialization.get_safe_globals())
    torch.save({"a": np.float64(1)}, tmp_path / "good.pth")
    torch.save({"a": np.array([None])}, tmp_path / "bad.pth")
    read_checkpoint(tmp_path / "good.pth")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "bad.pth")
    assert _allowed_by_torch() == before and set(torch.serialization.get_safe_globals()) == user
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "good.pth", weights_only=True)


@TRY
@given(st.integers(0, 10**9))
def test_flipped_bits_are_refused_or_data(seed: int) -> None:
    """In a file without checksums: a CheckpointError, or plain values."""
    draw = random.Random(seed)
    content = {
        "a": np.arange(3.0),
        "b": [np.float32(2), np.int8(3)],
        "c": np.zeros((2, 0)),
        "d": np.array(True),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pth"
        torch.save(content, path, _use_new_zipfile_serialization=False)
        data = bytearray(path.read_bytes())
        for _ in range(draw.choice([1, 1, 3])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            found = read_checkpoint(path)
        except CheckpointError:
            return
        plain = (int, float, complex, str, bytes, bool, type(None), np.ndarray)
        values = [
            item
            for value in found.values()
            for item in (value if isinstance(value, list | tuple) else [value])
        ]
        assert all(isinstance(value, plain) for value in values)
        assert all(value.dtype.kind in "biufc" for value in values if isinstance(value, np.ndarray))
