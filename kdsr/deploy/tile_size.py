"""How much of an image a network can restore at once in the memory that there is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdsr.models.restorer import Restorer
from kdsr.models.tiling import OVERLAP
from kdsr.runtime.memory import free_memory

PROBE = 64  # side of the image by which a network's memory is measured
SMALLEST = 64  # side of the smallest tile, in LQ pixels; smaller ones are mostly overlap
LARGEST_UNMEASURED = 512  # side of the tiles of a network whose memory torch does not see (ONNX)
_SHARE = 0.5  # of the free memory: the rest is for the scratch memory of convolutions, and for what else runs


class _PeakOfTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it and alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


@torch.no_grad()
def bytes_per_pixel(restorer: Restorer, net: Any, channels: int, device: torch.device) -> float:
    """Memory of a pass per LQ pixel, measured with a small image: proportional to the area in nearly all networks."""
    side = math.ceil(PROBE / (multiple := restorer.multiple_of(net))) * multiple
    image = torch.zeros(1, channels, side, side, device=device)
    with _PeakOfTensors() as memory:
        restorer(net, image)
    return memory.peak / side**2


def available(device: torch.device) -> int | None:
    """Bytes that are free on the device; None if unknown."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def fitting_tile(height: int, width: int, per_pixel: float, free: int | None) -> int | None:
    """Side of the largest tile that fits into half of the free memory, a multiple of 32; None: the whole image does.

    Args:
        height: Of the image, in LQ pixels.
        width: Likewise.
        per_pixel: Bytes per LQ pixel of a pass.
        free: Free bytes; None if unknown: the image is not cut.
    """
    if free is None or height * width * per_pixel <= free * _SHARE:
        return None
    side = math.isqrt(int(free * _SHARE / per_pixel)) // OVERLAP * OVERLAP
    return max(SMALLEST, side)
