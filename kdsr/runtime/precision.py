"""Arithmetic of a run: reduced precision and memory layout, as options of ``precision``."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from kdsr.runtime.cpu_threads import by_image
from kdsr.runtime.declarations import Options, option
from kdsr.runtime.errors import OptionError
from kdsr.runtime.winograd import use_winograd

REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WORDS = (*REDUCED, "float32")


class PrecisionOptions(Options):
    amp: str | None = option(
        None,
        "Reduced precision of the training steps: `bf16`, `fp16` with dynamic loss scaling, which overflows in SwinIR, "
        "HAT and RCAN, or `auto`, bf16 where the processor or GPU computes in it.",
        choices=("auto", *REDUCED),
    )
    student: str | None = option(
        None,
        "Precision of the student and the losses; weights stay in float32.",
        choices=_WORDS,
        shown_default="amp",
    )
    teacher: str | None = option(None, "Precision of the teachers.", choices=_WORDS, shown_default="amp")
    extractor: str | None = option(
        None,
        "Precision of the other frozen networks: the VQGAN, VGG19.",
        choices=_WORDS,
        shown_default="amp",
    )
    history: str | None = option(
        None,
        "Precision of the copies of the student: the history model, MCLIR's negative models.",
        choices=_WORDS,
        shown_default="amp",
    )
    allow_slow: bool = option(
        False,
        "Whether a processor without arithmetic in this precision may emulate it, which takes far longer.",
    )
    compile: str | None = option(
        None,
        "What `torch.compile` compiles in training steps: `frozen`, the networks other than the student, or `all`.",
        choices=("frozen", "all"),
    )
    winograd: bool = option(
        True,
        "Whether a CPU computes wide 3x3 convolutions of frozen networks in float32 by Winograd's algorithm: faster, "
        "with rounding errors three times as large.",
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


PARTS = ("student", "teacher", "extractor", "history")
# What autocast computes in reduced precision. A class derived from one may do more with its weights.
_CAST = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def is_fast(dtype: torch.dtype, on_cpu: bool) -> bool:
    """Whether this machine computes in a precision at least as fast as in float32."""
    if not on_cpu:
        return dtype is torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    # oneDNN accepts any AVX-512, and emulates
    emulated = torch.cpu._is_avx512_supported() and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not emulated


def dtypes_of(opt: Mapping[str, Any] | None, on_cpu: bool) -> dict[str, torch.dtype | None]:
    """The reduced precision of each of ``PARTS`` by the section ``precision``; None: float32."""
    options = PrecisionOptions.read(opt)
    amp = REDUCED.get(options.amp or "")
    if options.amp == "auto" and is_fast(torch.bfloat16, on_cpu):
        amp = torch.bfloat16
    given = {part: getattr(options, part) for part in PARTS}
    return {part: amp if word is None else REDUCED.get(word) for part, word in given.items()}


def slow_problems(opt: Mapping[str, Any], on_cpu: bool) -> list[str]:
    """Problems of a section ``precision`` that asks for an emulated precision on a CPU, unless ``allow_slow``."""
    if not on_cpu or opt.get("allow_slow"):
        return []
    needs = {"bf16": "AVX512-BF16 or AMX", "fp16": "AVX512-FP16"}
    words = {key: str(opt.get(key)) for key in ("amp", *PARTS)}
    return [
        f"precision.{key}: {word} needs a processor with {needs[word]}; this one emulates it, and a convolution takes "
        f"up to 90 times as long as in float32; remove it{', or set auto' if key == 'amp' else ''} "
        "(precision.allow_slow: true runs it all the same)"
        for key, word in words.items()
        if word in needs and not is_fast(REDUCED[word], on_cpu)
    ]


def compiler_problems(opt: Mapping[str, Any], on_cpu: bool) -> list[str]:
    """Problems of a section ``precision`` that asks for ``torch.compile`` on a machine where it does not work."""
    compiler = os.environ.get("CXX", "g++")
    if not opt.get("compile") or (shutil.which(compiler) if on_cpu else find_spec("triton")):
        return []
    missing = f"the C++ compiler {compiler} (CXX names another)" if on_cpu else "the package triton"
    return [
        f"precision.compile: torch.compile needs {missing}, which is not there; install it, or remove the option"
    ]


class Precision:
    """What ``precision:`` of the option file asks for.

    Args:
        opt: See ``PrecisionOptions``.
        device: Where the run computes.

    Attributes:
        dtypes: The reduced precision of each of ``PARTS``; None: float32.
        autocast: Around the student and the losses.

    Raises:
        OptionError: For another value of ``amp``, and for options that contradict each other.
    """

    def __init__(self, opt: dict[str, Any] | None, device: torch.device) -> None:
        options = PrecisionOptions.read(opt)
        self.device = device
        for name in ("amp", *PARTS):
            if problem := PrecisionOptions.declared()[name].problem(getattr(options, name)):
                raise OptionError(f"precision.{name}: {problem}")
        self.dtypes = dtypes_of(opt, device.type == "cpu")
        self.autocast: AbstractContextManager[Any] = self._computing_in(self.dtypes["student"])
        self.compile = options.compile
        self.winograd = options.winograd and device.type == "cpu" and not options.compile
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
        if torch.float16 not in self.dtypes.values() or "not implemented for 'Half'" not in str(error):
            return None
        return (
            f"precision: fp16: the {self.device.type} cannot compute this network in it "
            f"({str(error).splitlines()[0]}); use bf16, or leave it out for full precision"
        )

    def loss_scale(self) -> LossScale | None:
        """What keeps small gradients above fp16's smallest number; None where the precision needs none."""
        with_gradient = (self.dtypes["student"], self.dtypes["extractor"])
        return LossScale(self.device) if torch.float16 in with_gradient else None

    def place(self, net: nn.Module) -> nn.Module:
        """Moves a network to the run's device, and to its memory layout or the run's."""
        own = getattr(net, "memory_format_on_cpu", None) if self.device.type == "cpu" else None
        return net.to(self.device, memory_format=own or self.memory_format)  # type: ignore[call-overload]

    def fix(self, net: nn.Module, part: str, cast: bool) -> None:
        """Makes all passes of a network compute in the precision of its part, wherever it is called, and fast.

        In reduced precision results equal those under autocast to the bit, and features stay in it. Names of weights
        stay.

        Args:
            net: A network without gradients of its own.
            part: One of ``PARTS``.
            cast: Whether the weights that autocast would convert in each pass are converted now, for good.
        """
        dtype = self.dtypes[part]
        if dtype in getattr(net, "not_in", ()):
            dtype = None
        if dtype is not None or self.dtypes["student"] is not None:
            if cast and dtype is not None:
                for module in net.modules():
                    if type(module) in _CAST:
                        module.to(dtype)
            for method in ("forward", *getattr(net, "further_passes", ())):
                setattr(net, method, self._in_precision(getattr(net, method), dtype))
        elif cast and self.winograd:
            use_winograd(net)
        if self.compile:
            net.compile()
        elif self._shares_batches(net, part):
            net.forward = by_image(net.forward)

    def _shares_batches(self, net: nn.Module, part: str) -> bool:
        """Whether a batch can run on several CPU threads, an image on each: taps must see it whole."""
        several = self.device.type == "cpu" and torch.get_num_threads() > 1
        tapped = any(module._forward_hooks for module in net.modules())
        return several and (part == "extractor" or (part == "teacher" and not tapped))

    def eager(self) -> AbstractContextManager[Any]:
        """Within it compiled networks run uncompiled: for images of many sizes."""
        return torch.compiler.set_stance("force_eager") if self.compile else nullcontext()

    def _in_precision(self, forward: Callable[..., Any], dtype: torch.dtype | None) -> Callable[..., Any]:
        @functools.wraps(forward)
        def in_precision(*args: Any, **kwargs: Any) -> Any:
            with self._computing_in(dtype):
                return forward(*args, **kwargs)

        return in_precision

    def _computing_in(self, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


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
