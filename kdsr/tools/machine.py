"""The machine of a benchmark."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_bf16": "avx512_bf16",
    "amx_tile": "amx",
}  # by Linux's name
# what oneDNN may use under ONEDNN_MAX_CPU_ISA, by the start of its value; nothing listed: everything
_ONEDNN_LIMITS = {"SSE41": 0, "AVX512_CORE_BF16": 3, "AVX512_CORE_FP16": 3, "AVX512_CORE_AMX": 4, "AVX512": 2,
                  "AVX2": 1, "AVX10": 4, "AVX": 0}  # fmt: skip


def vector_extensions() -> list[str]:
    """Those of the processor that matter here (Linux), without those that ``ONEDNN_MAX_CPU_ISA`` rules out."""
    if not _CPUINFO.exists():
        return []
    flags = {
        flag
        for line in _CPUINFO.read_text().splitlines()
        if line.startswith("flags")
        for flag in line.split()
    }
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    limit = next((count for start, count in _ONEDNN_LIMITS.items() if allowed.startswith(start)), len(_FLAGS))
    return [name for flag, name in [*_FLAGS.items()][:limit] if flag in flags]


def machine(device: str, threads: int) -> str:
    """Returns a line on the machine."""
    name = platform.processor() or platform.machine()
    if _CPUINFO.exists():
        models = [line for line in _CPUINFO.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, {name}"
    extensions = ", ".join(vector_extensions()) or "no known vector extensions"
    return f"{name} ({extensions}), {threads} of {os.cpu_count()} CPU threads, torch {torch.__version__}"
