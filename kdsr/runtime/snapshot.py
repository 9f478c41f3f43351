"""A snapshot of objects with all that they hold, so that a trial of them can be undone."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_Undo = Callable[[], Any]
# of torch's own objects only these are entered: the others belong to the process, or to a compiler
_TORCH = (nn.Module, Optimizer, LRScheduler)
_WITH_STATE: tuple[Any, ...] = (torch.Generator, np.random.RandomState)
_LEFT_OUT = (
    "builtins",
    "torch",
    "logging",
    "types",
    "functools",
    "pathlib",
    "threading",
    "_thread",
    "weakref",
)


@contextmanager
def left_unchanged(root: object) -> Iterator[None]:
    """Afterwards ``root`` and all that it refers to is as it was before.

    That are attributes (not slots), lists, dicts, sets, tensors with their gradients, arrays, and generators of torch,
    NumPy and Python; of torch's own objects modules, optimizers and schedulers. All tensors are copied: networks take
    twice their memory meanwhile.
    """
    undo = _record(root)
    try:
        yield
    finally:
        with torch.no_grad():
            for step in undo:
                step()


def _record(root: object) -> list[_Undo]:
    """What puts each object back, after a walk through all of them."""
    undo: list[_Undo] = []
    seen: dict[int, object] = {}  # holds the objects, or another one could get the id
    waiting: list[Any] = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            undo.append(_tensor_undo(value))
            waiting.append(value.grad if value.is_leaf else None)
        elif isinstance(value, _WITH_STATE):
            undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                undo.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, np.random.Generator):
            undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, random.Random):
            undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, dict):
            undo.append(partial(_refill, value, value.update, dict(value)))
            waiting += value.values()
        elif isinstance(value, (list, deque)):
            undo.append(partial(_refill, value, value.extend, [*value]))
            waiting += value
        elif isinstance(value, set):
            undo.append(partial(_refill, value, value.update, {*value}))
        elif isinstance(value, tuple):
            waiting += value
        elif isinstance(value, MethodType):
            waiting.append(value.__self__)
        elif _is_entered(value):
            waiting.append(vars(value))
    return undo


def _is_entered(value: Any) -> bool:
    home = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and (
        isinstance(value, _TORCH) or (home not in _LEFT_OUT and not isinstance(value, type))
    )


def _refill(container: Any, fill: Callable[[Any], object], content: Any) -> None:
    container.clear()
    fill(content)


def _tensor_undo(tensor: Tensor) -> _Undo:
    leaf, trained = tensor.is_leaf, tensor.requires_grad
    gradient = tensor.grad if leaf else None
    written = (
        not tensor.is_meta and 0 not in tensor.stride()
    )  # nothing can be written into an expanded tensor
    content = tensor.detach().clone() if written else None

    def put_back() -> None:
        if content is not None:
            tensor.copy_(content)
        if leaf:
            tensor.requires_grad_(trained).grad = gradient

    return put_back
