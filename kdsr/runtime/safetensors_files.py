"""Reads and writes ``.safetensors``: names, shapes and bytes of tensors, and nothing that could run.

The format: https://github.com/huggingface/safetensors (a JSON header, then the tensors' bytes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from kdsr.runtime.atomic_files import write_whole
from kdsr.runtime.errors import CheckpointError

SUFFIX = ".safetensors"


class FlatWeights(dict[str, Tensor]):
    """A state dict that came from a file which holds nothing else.

    Attributes:
        metadata: The text entries of the file's header.
    """

    def __init__(self, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(weights)
        self.metadata = dict(metadata)


def is_safetensors(path: Path) -> bool:
    """Whether a file is one, by its suffix or its first bytes: the header's length (8 bytes, under 4 GB), ``{``."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == SUFFIX or (start[4:8] == b"\0\0\0\0" and start[8:] == b"{")


def read_safetensors(path: Path) -> FlatWeights:
    """Reads a file to the CPU.

    The format has no checksums: a torn file and a wrong header are found, changed bytes of a tensor are not.

    Raises:
        CheckpointError: The file is truncated, damaged or something else under this name.
    """
    try:
        content = path.read_bytes()
        weights = safetensors.torch.load(content)
        header = json.loads(
            content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=_no_name_twice
        )
        metadata = header.get("__metadata__") or {}
    except Exception as error:  # SafetensorError, and whatever numbers that do not go together lead to
        said = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as a safetensors file, truncated or something else? ({said})"
        ) from error
    return FlatWeights(weights, metadata)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return names


def save_safetensors(weights: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes a state dict, whole or not at all.

    Args:
        weights: Tensors of any device and stride, also such that share memory (each is written by itself).
        path: The file; its folder is made.
        metadata: Text for the file's header.

    Raises:
        TrainingError: It cannot be written (disk full, no permission).
    """
    # A copy of each: the library refuses tensors that overlap in memory.
    alone = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
    content = safetensors.torch.save(alone, {"format": "pt", **metadata})
    write_whole(path, lambda file: file.write(content))
