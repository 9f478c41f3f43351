"""Reads files of ``torch.save`` without running, or believing, anything that is in them.

``torch.load`` reads with ``weights_only=True``: tensors and plain values. A Lightning file (taming-transformers'
VQGAN) also pickles its callbacks, whose known names are mapped to empty stubs, so that Lightning need not be
installed. Numbers and arrays of numpy are read as data (``numpy_values``). Any other name is refused. Sizes that a file
states and does not hold, records whose checksum is wrong, and what no sound file has (compressed records, sparse
tensors) are refused too.
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
from kdsr.runtime.numpy_values import NoNumbers, StandIn, is_stand_in, stand_ins

SHOWN = 5  # names that a message lists
_ZIP_START = b"PK\x03\x04"  # what torch.load goes by

# What Lightning's trainer puts beside the weights: callbacks by class, and hyperparameters in its own dict.
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
    """Stands for a pickled object: takes any arguments and any state, keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertDict:
    """Stands for a dict type: unpickles to an ordinary dict (the reader fills no other type)."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _lightning_stubs() -> list[tuple[Callable[..., Any], str]]:
    # One class per name: where classes are keys of a dict, they must not collide.
    return [
        (type(name.rpartition(".")[2], (base,), {}), f"{package}.{name}")
        for package in _LIGHTNING_PACKAGES
        for base, names in ((_Inert, _LIGHTNING_CALLBACKS), (_InertDict, _LIGHTNING_DICTS))
        for name in names
    ]


def read_torch_file(path: Path) -> dict[str, Any]:
    """Reads a file of ``torch.save``, zipped or of the older kind, to the CPU.

    Args:
        path: A file that exists.

    Returns:
        The dict in it: tensors and plain values in plain dicts, lists and tuples; numpy's numbers as Python's, its
        arrays as read-only arrays; Lightning's objects are empty stubs.

    Raises:
        CheckpointError: Naming the file and what is wrong; the names of pickled code where there is any.
    """
    stubs = _lightning_stubs()
    try:
        pickled = _pickled_part(path)
        if b"bytearray" in pickled and "builtins.bytearray" in _names_in(pickled):
            # torch lets it pass, and a pickle of 50 bytes could ask for terabytes of zeros
            raise CheckpointError(_refusal(path, ["builtins.bytearray"]))
        stubs += stand_ins(path.stat().st_size)
        with _called_instead(stubs), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and old storages
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = _Plain(path.stat().st_size).copy(loaded)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises a dozen types for damaged files, all meaning: not readable
        refused = _refused_names(path, (name for _, name in stubs))
        if refused:
            raise CheckpointError(_refusal(path, refused)) from error
        if isinstance(error, NoNumbers):
            raise CheckpointError(
                f"{path}: refused, it holds {error}; of numpy only numbers and arrays of numbers are read"
            ) from error
        raise CheckpointError(
            f"{path}: cannot be read as a torch checkpoint, truncated or something else? ({_reason(error)})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


@contextlib.contextmanager
def _called_instead(stubs: Sequence[tuple[Callable[..., Any], str]]) -> Iterator[None]:
    """Lets ``torch.load`` call these functions where a pickle asks for the names that they replace."""
    allowed = _allowed_by_torch()  # where torch looks first; it has ``_codecs.encode``
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
        f"{path}: refused, it holds pickled code beside tensors: {listing(names)}; nothing of it "
        "was run. Save the weights alone with torch.save(net.state_dict(), ...)"
    )


def _reason(error: Exception) -> str:
    """The first line of an error, without torch's advice to load the file with weights_only=False."""
    said = str(error).strip()
    found = re.search(r"WeightsUnpickler error: *([^\n]+)", said)
    line = found[1] if found else (said.splitlines() or [""])[0]
    line = line.split(" Please use ")[0].strip().rstrip(".")
    return line if re.search("[A-Za-z]", line) else type(error).__name__  # for text torch says 101


# ------------------------------------------------------------------------------------------------ the file as a whole


def _pickled_part(path: Path) -> bytes:
    """What a file has pickled; of a zip the record, of the older kind everything.

    Raises:
        ValueError: A zip that ``torch.save`` cannot have written, or with a record that is damaged.
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
        # Before torch makes room for what a record says it is: torch stores its records as they are.
        if any(record.compress_type or record.file_size != record.compress_size for record in records):
            raise ValueError("its records are compressed, which torch.save does not do")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records are larger than the file")
        for record in records:
            if record.CRC == 0:
                record.CRC = None  # type: ignore[assignment]  # written under set_crc32_options(False): not compared
            with archive.open(record) as content:
                # zipfile compares the checksum at the end, which torch.load does not
                if record.filename.endswith("data.pkl"):
                    pickled += content.read()
                while content.read(2**20):
                    pass
    return pickled


class _Plain:
    """Copies what was unpickled into plain dicts, lists and tuples, and looks at each tensor.

    An unpickled ``OrderedDict`` can carry attributes that hide its own methods, and a tensor can state a size that the
    file does not hold, for which torch has then made room.

    Args:
        size: Bytes of the file: no tensor's storage can be larger.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.done: dict[int, Any] = {}
        self.open: set[int] = set()

    def copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._look_at(value)
            return value
        if isinstance(value, StandIn):
            return value.plain()
        if is_stand_in(value):
            raise NoNumbers("a class or function of numpy")
        if not isinstance(value, dict) and type(value) not in (list, tuple, set):
            return value
        if id(value) in self.done:  # else a few bytes of references to references grow without bound
            return self.done[id(value)]
        if id(value) in self.open:
            raise ValueError("it holds itself")
        self.open.add(id(value))
        made: Any
        if isinstance(value, dict):
            made = {self.copy(key): self.copy(item) for key, item in dict.items(value)}
        else:
            made = type(value)(self.copy(item) for item in value)
        self.done[id(value)] = made
        return made

    def _look_at(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
            raise ValueError("a tensor in it is sparse, quantized, nested or without data")
        if tensor.untyped_storage().nbytes() > self.size:
            raise ValueError(
                f"a tensor in it states {tensor.untyped_storage().nbytes()} bytes, which the file has not"
            )


# ------------------------------------------------------------------------------------------------ names in a pickle


def _refused_names(path: Path, allowed: Iterable[str]) -> list[str]:
    """Names that a file asks for and that are not known to be harmless."""
    known = set(allowed) | set(_allowed_by_torch())
    try:
        data = _pickled_part(path)
    except Exception:  # a damaged file is not asked what it wanted
        return []
    return [name for name in _names_in(data) if name not in known]


def _names_in(data: bytes) -> list[str]:
    """Names that pickles, one after the other, ask for, by reading their instructions without following them."""
    names: dict[str, None] = {}
    stream = io.BytesIO(data)
    try:
        while stream.tell() < len(data):
            _names_of_one(stream, names)
    except Exception:  # no pickle, or the end of it: the names read so far are all there are
        pass
    return list(names)


def _names_of_one(stream: io.BytesIO, names: dict[str, None]) -> None:
    strings: list[str] = []  # as far as they can become a name: pushed, or fetched from the memo
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
    """The first few names, and how many more there are."""
    first = between.join(str(name) for name in names[:shown])
    return f"{first}{between.rstrip(', ')} and {len(names) - shown} more" if len(names) > shown else first
