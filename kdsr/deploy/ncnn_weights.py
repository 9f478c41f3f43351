"""Reads the weights of ncnn's files (``.param`` and ``.bin``) as state dicts of BasicSR's networks.

The formats: https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure. Layers are named by their order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdsr.runtime.errors import CheckpointError

_MAGIC = "7767517"
_HALF = 0x01306B47  # tag of weights in half precision
_FULL = 0  # tag of weights in single precision
_OUTPUTS, _KERNEL, _BIAS, _WEIGHTS = "0", "1", "5", "6"  # parameters of a convolution

Layer = dict[str, Tensor]


@dataclass
class _Reader:
    """The bytes of a ``.bin``, read in order; sizes are numbers of values."""

    data: bytes
    position: int = 0

    def take(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise CheckpointError(
                f"is truncated: {len(self.data)} bytes, at least {self.position} are needed"
            )
        return self.data[start : self.position]

    def values(self, count: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(self.take(4 * count), "<f4").astype(np.float32))

    def weights(self, count: int) -> Tensor:
        tag = int.from_bytes(self.take(4), "little")
        if tag == _FULL:
            return self.values(count)
        if tag != _HALF:
            raise CheckpointError(f"weights with the tag {tag:#x}; only single and half precision are read")
        stored = self.take(2 * count + -2 * count % 4)  # padded to four bytes
        return torch.from_numpy(np.frombuffer(stored, "<f2", count).astype(np.float32))


def read_layers(param: Path, binary: Path) -> list[Layer]:
    """The weights of the convolutions and PReLUs, in the order of the file, in single precision.

    Raises:
        CheckpointError: A file is of another format, truncated, or has other layers with weights.
    """
    lines = param.read_text(encoding="utf-8", errors="replace").splitlines()
    if len(lines) < 2 or lines[0].strip() != _MAGIC:
        raise CheckpointError(f"{param}: is no ncnn file; its first line is not {_MAGIC}")
    reader, layers = _Reader(binary.read_bytes()), []
    try:
        for line in lines[2:]:
            kind, name, inputs, outputs, *words = line.split()
            options = dict(word.split("=", 1) for word in words[int(inputs) + int(outputs) :])
            if kind == "Convolution":
                layers.append(_convolution(options, reader))
            elif kind == "PReLU":
                layers.append({"weight": reader.values(int(options["0"]))})
            elif kind not in ("Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "PixelShuffle"):
                raise CheckpointError(f"layer {name}: {kind} is not read")
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{param}: cannot be read ({error!r})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{binary}: {error}") from error
    if reader.position != len(reader.data):
        raise CheckpointError(
            f"{binary}: {len(reader.data) - reader.position} bytes belong to no layer of {param}"
        )
    return layers


def _convolution(options: dict[str, str], reader: _Reader) -> Layer:
    outputs, kernel, count = (int(options[key]) for key in (_OUTPUTS, _KERNEL, _WEIGHTS))
    layer = {"weight": reader.weights(count).reshape(outputs, -1, kernel, kernel)}
    if options.get(_BIAS) == "1":
        layer["bias"] = reader.values(outputs)
    return layer


def rrdbnet_names(count: int) -> Iterator[str]:
    """Names of RRDBNet's convolutions (x4) in the order of its forward; ``count`` convolutions."""
    yield "conv_first"
    for block, part, conv in itertools.product(range((count - 6) // 15), (1, 2, 3), (1, 2, 3, 4, 5)):
        yield f"body.{block}.rdb{part}.conv{conv}"
    yield from ("conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last")


def srvgg_names(count: int) -> Iterator[str]:
    """Names of SRVGGNetCompact's layers, convolutions and PReLUs in turn."""
    return (f"body.{index}" for index in range(count))


NAMES = {"RRDBNet": rrdbnet_names, "SRVGGNetCompact": srvgg_names}


def read_ncnn(param: Path, binary: Path, architecture: str) -> dict[str, Tensor]:
    """The state dict of a network.

    Args:
        param: The layers, as text.
        binary: Their weights.
        architecture: A key of ``NAMES``.

    Returns:
        Tensors in float32, with BasicSR's names. Weights that are stored in half precision are exactly those.

    Raises:
        CheckpointError: A file is of another format or has another number of layers.
    """
    layers = read_layers(param, binary)
    names = list(NAMES[architecture](len(layers)))
    if len(names) != len(layers):
        raise CheckpointError(f"{param}: {len(layers)} layers with weights are no {architecture}")
    return {
        f"{name}.{key}": tensor
        for name, layer in zip(names, layers, strict=True)
        for key, tensor in layer.items()
    }
