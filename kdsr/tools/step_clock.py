"""Time and peak memory of the parts of a training step: every moment belongs to exactly one part."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

REST = "rest (degradations, losses, update, EMA)"
_MIB = 2**20


class Memory:
    """Peak memory between two calls: of the process on a CPU (Linux only), of torch's allocator on a GPU.

    Args:
        device: The device that is measured.
        process: Where the kernel tells about this process, and may be told to forget its peak.
    """

    def __init__(self, device: torch.device, process: Path = Path("/proc/self")) -> None:
        self.device = device
        self.process = process
        self.known = True

    def start(self) -> None:
        """Forgets the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            with open(self.process / "clear_refs", "r+") as file:
                file.write("5")  # resets VmHWM to what is resident now
        except OSError:  # macOS, and containers that do not allow it
            self.known = False

    def peak(self) -> float:
        """Highest use since ``start``, in MiB; NaN where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / _MIB
        if not self.known:
            return math.nan
        status = (self.process / "status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


@dataclass
class Clock:
    """Attributes time and peak memory to the part that is at work."""

    memory: Memory
    part: str = REST
    since: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)

    def start(self) -> None:
        """Begins a step; what has been measured before is forgotten."""
        self.seconds, self.peaks, self.part = {}, {}, REST
        self.memory.start()
        self.since = self._now()

    def switch(self, part: str) -> str:
        """From now on ``part`` is at work; returns the one that was."""
        now, before = self._now(), self.part
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self.since
        self.peaks[before] = max(self.peaks.get(before, 0.0), self.memory.peak())
        self.memory.start()
        self.part, self.since = part, self._now()
        return before

    def _now(self) -> float:
        if self.memory.device.type == "cuda":
            torch.cuda.synchronize(self.memory.device)
        return time.perf_counter()
