"""Reads files of ``torch.save`` without running or trusting their content.

- ``torch.load`` with ``weights_only=True`` reads tensors and plain values.
- Lightning files (taming-transformers' VQGAN) also pickle callbacks: their known names become empty stubs.
- numpy's numbers and arrays are read as data (``numpy_values``). Any other name is refused.
- Sizes larger than the file, wrong checksums, compressed records and sparse tensors are refused.
"""

from __future__ import annotations

import contextlib
import io
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from kdsr.runtime.errors import CheckpointError
from kdsr.runtime.numpy_values import NotNumeric, NumpyStandIn, is_stand_in, stand_ins

SHOWN = 5  # names that a message lists
_ZIP_START = b"PK\x03\x04"  # as torch.load tests it

# What Lightning's trainer saves with the weights: callbacks, and hyperparameters in its own dict type.
_LIGHTNING_CALLBACKS = (
    "callbacks.base.Callback",
    "callbacks.callback.Callback",
    "callbacks.early_stopping.EarlyStopping",
    "callbacks.gpu_stats_monitor.GPUStatsMonitor",
    "callbacks.lr_monitor.LearningRateMonitor",
    "callbacks.model_checkpoint.ModelCheckpoint",
    "callbacks.progress.ProgressBar",
    "callbacks.stochastic_weight_avg.StochasticWeightAveraging",
    "callbacks.timer.Timer",
    "callbacks.weight_averaging.WeightAveraging",
)
_LIGHTNING_DICTS = ("utilities.parsing.AttributeDict",)
_LIGHTNING_PACKAGES = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")


class _Inert:
    """A stub for a pickled object: ignores its arguments and state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertDict:
    """A stub for a dict type: unpickles to an ordinary dict, the only type that the reader fills."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _lightning_stubs() -> list[tuple[Callable[..., Any], str]]:
    # One class per name: classes may be keys of a dict.
    return [
        (type(name.rpartition(".")[2], (base,), {}), f"{package}.{name}")
        for package in _LIGHTNING_PACKAGES
        for base, names in ((_Inert, _LIGHTNING_CALLBACKS), (_InertDict, _LIGHTNING_DICTS))
        for name in names
    ]


def read_torch_file(path: Path) -> dict[str, Any]:
    """Reads a file of ``torch.save``, zip or legacy format, to the CPU.

    Returns:
        Tensors and plain values in dicts, lists and tuples; numpy's numbers as Python's, its arrays read-only;
        Lightning's objects as empty stubs.

    Raises:
        CheckpointError: The file is damaged or no dict, or holds pickled code, whose names are listed.
    """
    stubs = _lightning_stubs()
    try:
        pickled = _pickled_part(path)
        if b"bytearray" in pickled and "builtins.bytearray" in _names_in(pickled):
            # torch allows it, and a pickle of 50 bytes could allocate terabytes
            raise CheckpointError(_refusal(path, ["builtins.bytearray"]))
        stubs += stand_ins(path.stat().st_size)
        with _replaced_globals(stubs), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and old storages
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = _PlainCopy(path.stat().st_size).copy(loaded)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises a dozen types for damaged files
        refused = _refused_names(path, (name for _, name in stubs))
        if refused:
            raise CheckpointError(_refusal(path, refused)) from error
        if isinstance(error, NotNumeric):
            raise CheckpointError(
                f"{path}: refused, it holds {error}; of numpy's values only numbers and arrays of numbers are read"
            ) from error
        raise CheckpointError(
            f"{path}: cannot be read as a torch checkpoint, truncated or something else? ({_reason(error)})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


@contextlib.contextmanager
def _replaced_globals(stubs: Sequence[tuple[Callable[..., Any], str]]) -> Iterator[None]:
    """Makes ``torch.load`` call these functions in place of the names that they replace."""
    allowed = _allowed_by_torch()  # takes precedence, and has ``_codecs.encode``
    replaced = {name: allowed[name] for _, name in stubs if name in allowed}
    allowed.update((name, stub) for stub, name in stubs if name in replaced)
    try:
        with torch.serialization.safe_globals([*stubs]):
            yield
    finally:
        allowed.update(replaced)


def _allowed_by_torch() -> dict[str, Any]:
    return torch._weights_only_unpickler._get_allowed_globals()


def _refusal(path: Path, names: Sequence[str]) -> str:
    return (
        f"{path}: refused, it holds pickled code in addition to tensors: {listing(names)}; none of it "
        "was run. Save the weights alone with torch.save(net.state_dict(), ...)"
    )


def _reason(error: Exception) -> str:
    """The first line of an error, without torch's advice to load the file with weights_only=False."""
    message = str(error).strip()
    found = re.search(r"WeightsUnpickler error: *([^\n]+)", message)
    line = found[1] if found else (message.splitlines() or [""])[0]
    line = line.split(" Please use ")[0].strip().rstrip(".")
    # torch's message for text files is "101"
    return line if re.search("[A-Za-z]", line) else type(error).__name__


# ------------------------------------------------------------------------------------------------ the file as a whole


def _pickled_part(path: Path) -> bytes:
    """The pickle of a file: the record of a zip, all of a legacy file.

    Raises:
        ValueError: The zip has a damaged record or was not written by ``torch.save``.
    """
    with path.open("rb") as file:
        zipped = file.read(len(_ZIP_START)) == _ZIP_START
    if not zipped:
        return path.read_bytes()
    pickled = b""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.filename.endswith("constants.pkl") for record in records):
            raise ValueError("it is a TorchScript archive")
        # Checked before torch allocates memory for the sizes that records state.
        if any(record.compress_type or record.file_size != record.compress_size for record in records):
            raise ValueError("its records are compressed, which torch.save does not do")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records are larger than the file")
        for record in records:
            if record.CRC == 0:
                record.CRC = None  # type: ignore[assignment]  # written with set_crc32_options(False): no checksum
            with archive.open(record) as content:
                # zipfile checks the CRC at the end of a record, torch.load does not
                if record.filename.endswith("data.pkl"):
                    pickled += content.read()
                while content.read(2**20):
                    pass
    return pickled


class _PlainCopy:
    """Copies unpickled values into plain dicts, lists and tuples, and checks each tensor.

    An unpickled ``OrderedDict`` can have attributes that hide its methods, and a tensor can be larger than the file,
    whose ``size`` in bytes limits tensors' storages.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.copies: dict[int, Any] = {}  # by id
        self.open: set[int] = set()  # ids of containers that are being copied

    def copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._check(value)
            return value
        if isinstance(value, NumpyStandIn):
            return value.plain()
        if is_stand_in(value):
            raise NotNumeric("a class or function of numpy")
        if not isinstance(value, dict) and type(value) not in (list, tuple, set):
            return value
        if id(value) in self.copies:  # else nested references grow exponentially
            return self.copies[id(value)]
        if id(value) in self.open:
            raise ValueError("it contains itself")
        self.open.add(id(value))
        made: Any
        if isinstance(value, dict):
            made = {self.copy(key): self.copy(item) for key, item in dict.items(value)}
        else:
            made = type(value)(self.copy(item) for item in value)
        self.copies[id(value)] = made
        return made

    def _check(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
            raise ValueError("a tensor in it is sparse, quantized, nested or without data")
        if tensor.untyped_storage().nbytes() > self.size:
            raise ValueError(
                f"a tensor in it claims {tensor.untyped_storage().nbytes()} bytes, more than the file has"
            )


# ------------------------------------------------------------------------------------------------ names in a pickle


def _refused_names(path: Path, allowed: Iterable[str]) -> list[str]:
    """Names in a file's pickle that are not allowed."""
    known = set(allowed) | set(_allowed_by_torch())
    try:
        data = _pickled_part(path)
    except Exception:  # damaged: reported as such
        return []
    return [name for name in _names_in(data) if name not in known]


def _names_in(data: bytes) -> list[str]:
    """Names that consecutive pickles import, read from their opcodes without executing them."""
    names: dict[str, None] = {}
    stream = io.BytesIO(data)
    try:
        while stream.tell() < len(data):
            _names_of_one(stream, names)
    except Exception:  # not a pickle, or truncated
        pass
    return list(names)


def _names_of_one(stream: io.BytesIO, names: dict[str, None]) -> None:
    strings: list[str] = []  # pushed, or fetched from the memo
    memo: dict[int, str] = {}
    last: str | None = None
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            # files of protocol 2 use Python 2's names
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names[f"{module}.{name}"] = None
        elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
            names[".".join(strings[-2:])] = None
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            names[f"copyreg extension {argument}"] = None
        elif opcode.name == "MEMOIZE" and last is not None:
            memo[len(memo)] = last
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and last is not None:
            memo[int(str(argument))] = last
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            strings += [memo[int(str(argument))]] if int(str(argument)) in memo else []
        if opcode.name not in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            last = argument if isinstance(argument, str) else None
            strings += [last] if last is not None and "GLOBAL" not in opcode.name else []


def listing(names: Sequence[Any], shown: int = SHOWN, between: str = ", ") -> str:
    """The first few names, and the number of others."""
    first = between.join(str(name) for name in names[:shown])
    return f"{first}{between.rstrip(', ')} and {len(names) - shown} more" if len(names) > shown else first
