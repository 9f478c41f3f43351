"""Unpickles numpy's numbers and arrays without numpy's own functions.

Checkpoints may hold a PSNR (``np.float64``) or the state of numpy's generator. numpy's unpickling functions also
create arrays of objects and of any size. These replacements accept only ``bool``, integers, floats and complex
numbers whose bytes are in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_PYTHON = {"b": bool, "i": int, "u": int, "f": float, "c": complex}  # by numpy's kind of number


class NotNumeric(Exception):
    """A numpy value that is neither a number nor an array of numbers; the message describes it."""


class NumpyStandIn:
    """A numpy object during unpickling."""

    def __hash__(self) -> int:
        raise NotNumeric("a numpy value in a set or as a dict key")

    def plain(self) -> np.ndarray:
        raise NotNumeric("a numpy dtype that is not a number's")


class _Dtype(NumpyStandIn):
    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(rf"[{''.join(_PYTHON)}]\d\d?", code):
            raise NotNumeric(f"a numpy value of dtype {str(code)[:20]}")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        # version, byte order, then the parts of structured dtypes
        if not isinstance(state, tuple) or len(state) != 8 or any(part is not None for part in state[2:5]):
            raise NotNumeric("a numpy value of a structured dtype")
        self.dtype = np.dtype(self.code).newbyteorder(state[1])


class _Array(NumpyStandIn):
    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, content = state
        self.array = _view(shape, dtype, content, "F" if columns_first else "C")

    def plain(self) -> np.ndarray:
        if self.array is None:
            raise ValueError("a numpy array in it has no content")
        return self.array


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _Array:
        raise NotNumeric("a numpy array of a subclass of ndarray")
    return _Array()


def _scalar(dtype: Any, content: Any) -> bool | int | float | complex:
    value = _view((), dtype, content, "C")
    return _PYTHON[value.dtype.kind](value[()])


def _view(shape: Any, dtype: Any, content: Any, order: Any) -> np.ndarray:
    """An array that shares the bytes: copies would let a small file fill the memory."""
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
        raise ValueError("a numpy value in it is incomplete")
    if not isinstance(shape, tuple) or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError("a numpy array in it has an impossible shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(content):
        raise ValueError("a numpy array in it has a size that does not match its bytes")
    return np.ndarray(shape, dtype.dtype, content, order=order)


_NUMPY: list[tuple[Callable[..., Any], str]] = [
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # numpy 1 and 2
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def stand_ins(size: int) -> list[tuple[Callable[..., Any], str]]:
    """Replacements, with their names, for the functions that pickles of numpy values and of Python's bytes call.

    ``size`` is the file's in bytes, an upper limit for the unpickled bytes.
    """
    left = size

    def encode(text: Any, encoding: Any) -> bytes:
        # How Python pickles bytes. Other encodings that torch allows (hex) could double them again and again.
        nonlocal left
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError("bytes in it have an encoding that Python does not write")
        left -= len(text)
        if left < 0:
            raise ValueError("it holds more bytes than the file")
        return text.encode("latin1")

    return [*_NUMPY, (encode, "_codecs.encode"), (lambda: b"", "builtins.bytes")]


def is_stand_in(value: Any) -> bool:
    """Whether an unpickled value is itself one of these functions or classes."""
    return any(value is function for function, _ in _NUMPY)
