"""Free memory, how the process keeps it, and a limit on the size of networks that are built."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import nn
from torch.nn.modules import module as torch_module

from kdsr.runtime.errors import OptionError

# mallopt's parameters (malloc.h)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
MOST_LAYERS = 20_000  # the largest network here, RCAN's teacher, has 2440
_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that this process can still allocate in its machine or container; None if unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        return None
    try:
        most = (_CGROUP / "memory.max").read_text().strip()
        if most.isdecimal():
            found.append(max(int(most) - int((_CGROUP / "memory.current").read_text()), 0))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def keep_freed_memory(keep: bool = True) -> None:
    """Lets the C library (glibc) keep freed blocks of tensors for the next ones, or return them as it does by default.

    By default each block above 32 MiB goes back to the system, which clears every page again for the next tensor of
    that size: a quarter of the time of a VQGAN's pass over six images at once (docs/benchmarks.md, "Levers").
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0 if keep else 2**16)
        mallopt(_MMAP_THRESHOLD, 2**25)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**26)


def free_shared_memory() -> int | None:
    """Bytes that processes can still share through ``/dev/shm``, a file system with a limit of its own."""
    found = [free_memory()]
    with suppress(OSError):
        found.append(shutil.disk_usage("/dev/shm").free)
    return min((free for free in found if free is not None), default=None)


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def require_memory(net: nn.Module | None, place: str, copies: int) -> None:
    """A network that is built must leave room for the further copies of its weights that a training holds.

    Raises:
        OptionError: There is less memory.
    """
    weights = net.parameters() if net is not None else ()
    taken = sum(weight.numel() * weight.element_size() for weight in weights)
    _require(taken * (copies - 1), free_memory(), place, copies)


def _require(taken: int, free: int | None, place: str, copies: int) -> None:
    if free is not None and taken > free:
        times = "" if copies == 1 else f" ({copies} copies in training)"
        raise OptionError(f"{place}: its weights{times} need more than the {gib(free)} of free memory")


@contextmanager
def limit_network_size(place: str, copies: int = 1) -> Iterator[None]:
    """Refuses networks, built inside the block, that are too large: a typing error must not exhaust the memory.

    Layers and parameters are counted as they are registered.

    Args:
        place: What is built, for the message.
        copies: Copies of the weights: 1, or 4 with gradients and an optimizer's moments.

    Raises:
        OptionError: The block builds more than 20,000 layers or needs more than the free memory.
    """
    free = free_memory()
    layers = taken = 0

    def count_layer(owner: nn.Module, name: str, layer: nn.Module | None) -> None:
        nonlocal layers
        layers += layer is not None
        if layers > MOST_LAYERS:
            raise OptionError(f"{place}: more than {MOST_LAYERS:,d} layers; is one of its numbers too large?")

    def count_weights(owner: nn.Module, name: str, weights: nn.Parameter | None) -> None:
        nonlocal taken
        taken += 0 if weights is None else weights.numel() * weights.element_size() * copies
        _require(taken, free, place, copies)

    hooks = [
        torch_module.register_module_module_registration_hook(count_layer),
        torch_module.register_module_parameter_registration_hook(count_weights),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
