"""What a network costs: parameters, operations, activations, latency and memory."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kdsr.deploy.exportable import exportable
from kdsr.deploy.network_file import OpenedNetwork
from kdsr.deploy.onnx_network import OnnxNetwork
from kdsr.deploy.traced import onnx_content, onnx_model, traced


@dataclass(frozen=True)
class Counts:
    """Operations of a pass over one image.

    Attributes:
        flops: Floating-point operations of convolutions and matrix products, as ``torch.utils.flop_counter`` counts
            them: a multiplication and an addition are two.
        activations: Elements of the outputs of all convolutions.
    """

    flops: int
    activations: int


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the passes that were measured."""

    median: float
    shortest: float
    longest: float


class _Convolutions(TorchDispatchMode):
    """Counts the elements that convolutions give."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.elements += result.numel()
        return result


def fitting(size: tuple[int, int], opened: OpenedNetwork) -> tuple[int, int]:
    """H and W, rounded up to what the network takes."""
    height, width = (-(-side // opened.multiple_of) * opened.multiple_of for side in size)
    return opened.fixed_size or (height, width)


def count(opened: OpenedNetwork, size: tuple[int, int]) -> Counts:
    """The operations for an image of H×W, rounded up to what the network takes.

    Without computing anything, on torch's meta device, where the network allows that. Convolutions that a network
    merges after training count as one (SPAN).
    """
    shape = (1, opened.channels_in, *fitting(size, opened))
    net = exportable(opened.net)
    try:
        return _counted(copy.deepcopy(net).to("meta"), torch.empty(shape, device="meta"))
    except Exception:  # a network that looks at values, or makes tensors on the CPU
        return _counted(net.cpu(), torch.zeros(shape))


def _counted(net: nn.Module, x: Tensor) -> Counts:
    with torch.no_grad(), _Convolutions() as convolutions, FlopCounterMode(display=False) as operations:
        net(x)
    return Counts(operations.get_total_flops(), convolutions.elements)


def latency(
    net: Callable[[Tensor], Tensor], x: Tensor, *, warmup: int, repeat: int, by_events: bool = False
) -> Latency:
    """The time of a pass.

    Args:
        net: The network; on a GPU, of torch.
        x: (N, C, H, W).
        warmup: Passes before the measurement.
        repeat: Measured passes.
        by_events: Whether CUDA events measure the work of the GPU, in place of a clock.
    """
    times = []
    with torch.no_grad():
        for index in range(warmup + repeat):
            took = _by_events(net, x) if by_events else _by_clock(net, x)
            times += [took] if index >= warmup else []
    return Latency(statistics.median(times), min(times), max(times))


def _by_clock(net: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    net(x)
    return 1000 * (time.perf_counter() - start)


def _by_events(net: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    net(x)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def in_onnx(opened: OpenedNetwork, threads: int) -> OnnxNetwork:
    """The network, exported and computed by onnxruntime on the CPU.

    Raises:
        ExportError: It cannot be exported for free sizes.
        OptionError: A package is missing.
    """
    program, smallest = traced(opened, None)
    metadata = {"multiple_of": str(opened.multiple_of), "smallest": str(smallest)}
    return OnnxNetwork(onnx_content(onnx_model(program, half=False), metadata), threads=threads)


@dataclass(frozen=True)
class NtireScore:
    """Score of the NTIRE challenges on efficient super-resolution since 2024 (arXiv 2504.10686): lower is better,
    the baseline has e² = 7.39.

    Args:
        milliseconds, flops, parameters: Of the baseline.
    """

    milliseconds: float
    flops: float
    parameters: float

    def __call__(self, milliseconds: float, flops: float, parameters: float) -> float:
        parts = (
            (0.7, milliseconds / self.milliseconds),
            (0.15, flops / self.flops),
            (0.15, parameters / self.parameters),
        )
        try:
            return sum(weight * math.exp(2 * ratio) for weight, ratio in parts)
        except OverflowError:
            return math.inf
