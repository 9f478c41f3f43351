"""Arithmetic of a run: reduced precision and memory layout, as options of ``precision``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kdsr.runtime.declarations import Options, option
from kdsr.runtime.errors import OptionError

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PrecisionOptions(Options):
    amp: str | None = option(
        None,
        "Reduced precision of the training steps: `bf16`, or `fp16` with dynamic loss scaling, which overflows in "
        "SwinIR, HAT and RCAN.",
        choices=tuple(AMP_DTYPES),
    )
    channels_last: bool = option(
        False, "Whether tensors are in a memory layout that helps convolutional networks on a GPU."
    )
    cudnn_benchmark: bool = option(
        False, "Whether cuDNN picks the fastest kernels: two runs then differ in the last bits."
    )
    deterministic: bool = option(
        False,
        "Whether only algorithms run that give the same bits each time, which a GPU needs for an exact resume; an "
        "operation without one is an error.",
    )


class Precision:
    """What ``precision:`` of the option file asks for.

    Args:
        opt: See ``PrecisionOptions``.
        device: Where the run computes.

    Raises:
        OptionError: For another value of ``amp``, and for options that contradict each other.
    """

    def __init__(self, opt: dict[str, Any] | None, device: torch.device) -> None:
        options = PrecisionOptions.read(opt)
        self.device = device
        if problem := PrecisionOptions.declared()["amp"].problem(options.amp):
            raise OptionError(f"precision.amp: {problem}")
        self.amp_dtype = AMP_DTYPES[options.amp] if options.amp else None
        # around the forward passes of a training step
        self.autocast: AbstractContextManager[Any] = (
            torch.autocast(device.type, self.amp_dtype) if self.amp_dtype else nullcontext()
        )
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        # BasicSR's pipeline switches it on; two runs then pick different kernels and end in different bits.
        torch.backends.cudnn.benchmark = options.cudnn_benchmark
        if options.deterministic:
            if options.cudnn_benchmark:
                raise OptionError(
                    "precision.deterministic: true needs cudnn_benchmark: false, which picks by time"
                )
            # Read when cuBLAS is first used; without it matrix products may add up in any order.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(options.deterministic)

    def problem(self, error: BaseException) -> str | None:
        """What to do about an error of a forward pass that this precision has caused; None for any other error."""
        if self.amp_dtype is None or "not implemented for 'Half'" not in str(error):
            return None
        return (
            f"precision.amp: fp16: the {self.device.type} cannot compute this network in it "
            f"({str(error).splitlines()[0]}); use bf16, or leave it out for full precision"
        )

    def loss_scale(self) -> LossScale | None:
        """What keeps small gradients above fp16's smallest number; None where the precision needs none."""
        return LossScale(self.device) if self.amp_dtype is torch.float16 else None

    def place(self, net: nn.Module) -> nn.Module:
        """Moves a network to the run's device, and to its memory layout or the run's."""
        own = getattr(net, "memory_format_on_cpu", None) if self.device.type == "cpu" else None
        return net.to(self.device, memory_format=own or self.memory_format)  # type: ignore[call-overload]


class LossScale:
    """Dynamic loss scaling (Micikevicius et al., "Mixed Precision Training", ICLR 2018), all on the device.

    The loss is multiplied by ``factor`` and the gradients are divided by it. A step whose gradients overflow
    halves it, ``GROWTH_INTERVAL`` good ones in a row double it. ``torch.amp.GradScaler`` does the same and reads
    the overflow on the host at every step, unless the optimizer is fused.

    Args:
        device: Where the run computes.
    """

    FIRST_FACTOR = 65536.0
    RANGE = (2.0**-24, 2.0**48)  # halving 0 and doubling infinity would change nothing any more
    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), self.FIRST_FACTOR, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divides the gradients by the factor, in place; a power of two, so that nothing is rounded."""
        torch._foreach_mul_(list(gradients), self.factor.reciprocal())

    def follow(self, good: Tensor, overflowed: Tensor) -> None:
        """Adapts the factor to a step (boolean scalars on the device; neither: a step that tells nothing)."""
        counted = torch.where(good, self.good_steps + 1, self.good_steps)
        grows = counted >= self.GROWTH_INTERVAL
        self.good_steps = torch.where(grows | overflowed, torch.zeros_like(counted), counted)
        factor = torch.where(grows, self.factor * 2, self.factor)
        self.factor = torch.where(overflowed, factor / 2, factor).clamp(*self.RANGE)

    def state(self) -> dict[str, Tensor]:
        return {"factor": self.factor.cpu(), "good_steps": self.good_steps.cpu()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what ``state`` gave.

        Raises:
            ValueError: The factor is none.
        """
        if not self.RANGE[0] <= float(state["factor"]) <= self.RANGE[1]:
            raise ValueError(f"the loss scale is {float(state['factor'])}")
        self.factor.copy_(state["factor"])
        self.good_steps.copy_(state["good_steps"])
