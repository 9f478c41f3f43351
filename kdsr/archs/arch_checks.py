"""Shared checks of networks: option values and image sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kdsr.runtime.errors import DataError


def require_multiple(x: Tensor, multiple: int, network: str) -> None:
    """Raises a ``DataError`` if H or W of (N, C, H, W) is not a multiple of ``multiple``.

    For training patches and user code: validation and tests pad images by the network's ``multiple_of``.
    """
    height, width = x.shape[-2:]
    if height % multiple or width % multiple:
        raise DataError(
            f"{network}: image sides must be multiples of {multiple}, not {height}x{width} pixels"
        )


def is_whole(values: Any, least: float = -math.inf) -> bool:
    """Whether a value is a list of whole numbers of at least ``least``."""
    return isinstance(values, list | tuple) and all(type(value) is int and value >= least for value in values)


def minimum_problems(options: Mapping[str, Any], **minimum: int) -> list[str]:
    """Problems of integer options that are below their minimum."""
    return [
        f"{key}: must be at least {lowest}, not {options[key]}"
        for key, lowest in minimum.items()
        if isinstance(options.get(key), int) and options[key] < lowest
    ]
