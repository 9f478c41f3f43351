"""Arithmetic of a run: reduced precision and memory layout, as options of ``precision``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from kdsr.runtime.errors import OptionError


class Precision:
    """What ``precision:`` of the option file asks for.

    Args:
        opt: ``amp`` (None or ``bf16``; fp16 overflows in SwinIR and RCAN and is not offered), ``channels_last``
            (bool; helps convolutional networks on a GPU), ``cudnn_benchmark`` (bool; faster and not repeatable to the
            bit). All off by default.
        device: Where the run computes.

    Raises:
        OptionError: For another value of ``amp``.
    """

    KEYS: dict[str, type | tuple[type, ...]] = {
        "amp": (str, type(None)),
        "channels_last": bool,
        "cudnn_benchmark": bool,
    }

    def __init__(self, opt: dict[str, Any] | None, device: torch.device) -> None:
        opt = opt or {}
        self.device = device
        amp = opt.get("amp")
        if amp not in (None, "bf16"):
            raise OptionError(
                f"precision.amp: {amp!r} is not known; use bf16, or leave it out for full precision"
            )
        self.amp_dtype = torch.bfloat16 if amp else None
        self.memory_format = torch.channels_last if opt.get("channels_last") else torch.contiguous_format
        # BasicSR's pipeline switches it on; two runs then pick different kernels and end in different bits.
        torch.backends.cudnn.benchmark = bool(opt.get("cudnn_benchmark", False))

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of a training step's forward passes; does nothing in full precision."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)

    def place(self, net: nn.Module) -> nn.Module:
        """Moves a network to the run's device and memory layout."""
        return net.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
