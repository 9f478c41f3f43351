"""Time and peak memory of the parts of a training step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

REST = "rest (degradations, losses, update, EMA)"
_MIB = 2**20


def now(device: torch.device) -> float:
    """Seconds; on a GPU once it has finished all work so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def mib(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}"


class Memory:
    """Peak memory of ``device`` between two calls: of the process on a CPU (Linux only), of torch's allocator on a GPU.

    ``process`` is the process's folder in ``/proc``.
    """

    def __init__(self, device: torch.device, process: Path = Path("/proc/self")) -> None:
        self.device = device
        self.process = process
        self.known = True

    def start(self) -> None:
        """Resets the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            with open(self.process / "clear_refs", "r+") as file:
                file.write("5")  # resets VmHWM to the current value
        except OSError:  # macOS, and containers that do not allow it
            self.known = False

    def peak(self) -> float:
        """Peak use since ``start`` in MiB; NaN if unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / _MIB
        if not self.known:
            return math.nan
        status = (self.process / "status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


@dataclass
class Clock:
    """Attributes time, peak memory and operations to the current part; each moment belongs to exactly one part.

    Operations are counted while there is a ``counter``, and then kept.
    """

    memory: Memory
    part: str = REST
    since: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    counter: FlopCounterMode | None = None

    def start(self) -> None:
        """Starts a step and clears the measurements."""
        self.seconds, self.peaks, self.part = {}, {}, REST
        self.memory.start()
        self.since = now(self.memory.device)

    def switch(self, part: str) -> str:
        """Makes ``part`` the current one; returns the previous one."""
        time_now, before = now(self.memory.device), self.part
        self.seconds[before] = self.seconds.get(before, 0.0) + time_now - self.since
        self.peaks[before] = max(self.peaks.get(before, 0.0), self.memory.peak())
        if self.counter is not None:
            counted = self.counter.get_total_flops() - sum(self.flops.values())
            self.flops[before] = self.flops.get(before, 0) + counted
        self.memory.start()
        self.part, self.since = part, now(self.memory.device)
        return before
