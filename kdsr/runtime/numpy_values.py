"""Numbers and arrays of numpy in a pickle, read without numpy's own unpickling.

Programs save a PSNR (``np.float64``) or the state of numpy's generator beside the weights. The functions that numpy
pickles under would also make arrays of objects and of any size. Stand-ins under their names take numbers only:
``bool``, integers, floats and complex numbers whose bytes are in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_PYTHON = {"b": bool, "i": int, "u": int, "f": float, "c": complex}  # by numpy's kind of number


class NoNumbers(Exception):
    """A value of numpy that is no number and no array of numbers; the message says what it is."""


class StandIn:
    """An object of numpy while it is unpickled."""

    def __hash__(self) -> int:
        raise NoNumbers("a value of numpy in a set, or as the key of a dict")

    def plain(self) -> np.ndarray:
        raise NoNumbers("a dtype of numpy that belongs to no number")


class _Dtype(StandIn):
    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(rf"[{''.join(_PYTHON)}]\d\d?", code):
            raise NoNumbers(f"a value of numpy with dtype {str(code)[:20]}")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        # version, byte order, then what dtypes of several fields have
        if not isinstance(state, tuple) or len(state) != 8 or any(part is not None for part in state[2:5]):
            raise NoNumbers("a value of numpy with a dtype of several parts")
        self.dtype = np.dtype(self.code).newbyteorder(state[1])


class _Array(StandIn):
    array: np.ndarray | None = None

    def __init__(self) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, content = state
        self.array = _view(shape, dtype, content, "F" if columns_first else "C")

    def plain(self) -> np.ndarray:
        if self.array is None:
            raise ValueError("an array of numpy in it has no content")
        return self.array


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _Array:
        raise NoNumbers("an array of numpy of another class than ndarray")
    return _Array()


def _scalar(dtype: Any, content: Any) -> bool | int | float | complex:
    value = _view((), dtype, content, "C")
    return _PYTHON[value.dtype.kind](value[()])


def _view(shape: Any, dtype: Any, content: Any, order: Any) -> np.ndarray:
    """An array on the bytes themselves: a copy of each array would let a small file fill the memory."""
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
        raise ValueError("a value of numpy in it is incomplete")
    if not isinstance(shape, tuple) or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError("an array of numpy in it states an impossible shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(content):
        raise ValueError("an array of numpy in it states a size that it has not")
    return np.ndarray(shape, dtype.dtype, content, order=order)


_NUMPY: list[tuple[Callable[..., Any], str]] = [
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # numpy 1 and 2
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def stand_ins(size: int) -> list[tuple[Callable[..., Any], str]]:
    """What is called instead of the functions that numpy's values, and Python's bytes, are pickled with.

    Args:
        size: Bytes of the file; the bytes unpickled from it are no more.

    Returns:
        Functions and classes, each with the name in the pickle that it replaces.
    """
    left = size

    def encode(text: Any, encoding: Any) -> bytes:
        # Python writes bytes so; other encodings of torch's own entry (hex) double them, and again, without end
        nonlocal left
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError("bytes in it are encoded in a way that Python does not write")
        left -= len(text)
        if left < 0:
            raise ValueError("it holds more bytes than the file")
        return text.encode("latin1")

    def no_bytes() -> bytes:
        return b""

    return [*_NUMPY, (encode, "_codecs.encode"), (no_bytes, "builtins.bytes")]


def is_stand_in(value: Any) -> bool:
    """Whether a value of an unpickled tree is one of these functions or classes itself."""
    return any(value is function for function, _ in _NUMPY)
