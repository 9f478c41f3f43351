"""Reads and writes ``.safetensors``: tensors only, no code.

The format: https://github.com/huggingface/safetensors (a JSON header, then the tensors' bytes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.errors import CheckpointError

SUFFIX = ".safetensors"


class FlatWeights(dict[str, Tensor]):
    """A state dict read from a safetensors file; ``metadata`` are the text entries of the file's header."""

    def __init__(self, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(weights)
        self.metadata = dict(metadata)


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by suffix or first bytes: header length (8 bytes, under 4 GB), then ``{``."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == SUFFIX or (start[4:8] == b"\0\0\0\0" and start[8:] == b"{")


def read_safetensors(path: Path) -> FlatWeights:
    """Reads a file to the CPU.

    The format has no checksums: a truncated file or a wrong header is detected, changed tensor bytes are not.

    Raises:
        CheckpointError: The file is truncated, damaged or of another format.
    """
    try:
        content = path.read_bytes()
        weights = safetensors.torch.load(content)
        header = json.loads(
            content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=_unique_names
        )
        metadata = header.get("__metadata__") or {}
    except Exception as error:  # SafetensorError, and various others for inconsistent numbers
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as a safetensors file, truncated or something else? ({reason})"
        ) from error
    return FlatWeights(weights, metadata)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return names


def save_safetensors(weights: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes a state dict atomically, with ``metadata`` as text in the file's header.

    Tensors may be on any device and have any strides; those that share memory are written separately.

    Raises:
        TrainingError: It cannot be written (disk full, no permission).
    """
    # The library refuses tensors that overlap in memory.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
    content = safetensors.torch.save(copies, {"format": "pt", **metadata})
    atomic_write(path, lambda file: file.write(content))
