"""The parts of a training step: hooks on a model's networks switch between them, so that their times add up to it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kdsr.distill.step import Step
from kdsr.runtime.cpu_threads import one_thread
from kdsr.tools.step_clock import REST, Clock, Memory, mib

STUDENT = "student, forward and backward"
TEACHER = "teacher"
WITH_GRADIENT = "{} with gradient, forward and backward"
FURTHER_PASS = "code_logits"  # of a VQGAN, beside its forward pass
ADAPTERS = "adapters; backward pass of the feature losses"


def networks_by_part(model: Any) -> dict[torch.nn.Module, str]:
    """The networks of a step, each with its part."""
    found = {model.net_g: STUDENT}
    for key, teacher in model.teachers.items():
        found[teacher.net] = TEACHER if key == "t" else f"{TEACHER} {key.removeprefix('t').upper()}"
    for term in model.terms.values():
        for name, net in term.networks().items():
            found.setdefault(net, term.LABELS.get(name, name))
    return found


@contextmanager
def watched(model: Any, clock: Clock) -> Iterator[None]:
    """Connects ``clock`` to the networks, the backward pass and the optimizer of a model by hooks."""
    undo = ExitStack()
    with_gradient: list[str] = []  # frozen networks in the backward pass

    def watch(net: torch.nn.Module, label: str, frozen: bool = False) -> None:
        stack: list[str] = []

        def begin(*_: Any) -> None:
            part = label
            if frozen and torch.is_grad_enabled():
                part = WITH_GRADIENT.format(label)
                with_gradient.append(part)
            stack.append(clock.switch(part))

        def end(*_: Any) -> None:
            clock.switch(stack.pop())

        undo.callback(net.register_forward_pre_hook(begin).remove)
        undo.callback(net.register_forward_hook(end).remove)
        if (further := getattr(net, FURTHER_PASS, None)) is not None:

            def watched_pass(*inputs: Any) -> Any:
                begin()
                output = further(*inputs)
                end()
                return output

            setattr(net, FURTHER_PASS, watched_pass)
            undo.callback(delattr, net, FURTHER_PASS)

    teachers = [teacher.net for teacher in model.teachers.values()]
    for net, part in networks_by_part(model).items():
        watch(net, part, frozen=net is not model.net_g and net not in teachers)
    feature_losses = [term.loss for term in model.terms.values() if term.tap_groups()]
    for loss in feature_losses:
        watch(
            loss, f"{type(loss).__name__} (feature loss)"
        )  # SLKD's losses compute their gradient in the forward pass
    for group in model.student_bundle.adapters.values() if feature_losses else ():
        for adapter in group:
            watch(adapter, ADAPTERS)

    compute_losses = model.compute_losses

    def compute_losses_then_backward(step: Step) -> dict[str, Tensor]:
        # The backward pass starts with the losses and frozen networks. The student's part starts when the gradient of
        # its output is complete.
        with_gradient.clear()
        model.output.register_hook(lambda gradient: clock.switch(STUDENT) and None)
        losses = compute_losses(step)
        clock.switch(with_gradient[-1] if with_gradient else ADAPTERS if feature_losses else REST)
        return losses

    model.compute_losses = compute_losses_then_backward
    backward = model.guard.backward

    def backward_alone(*args: Any) -> None:
        backward(*args)
        clock.switch(REST)

    model.guard.backward = backward_alone
    try:
        yield
    finally:
        del model.compute_losses, model.guard.backward
        undo.close()


def measure(model: Any, batch: dict[str, Tensor], *, warmup: int, repeat: int) -> tuple[pd.DataFrame, float]:
    """Runs training steps and measures their parts.

    Args:
        model: A model of this package, in training.
        batch: The input of its ``feed_data``.
        warmup: Steps before the measurement.
        repeat: Measured steps.

    Returns:
        One row per part and measured step (columns step, part, seconds, gflop, peak_mib), and the memory in MiB before
        the first measured step. Floating-point operations are counted in a step of their own before the others.
    """
    clock = Clock(Memory(model.device))
    rows: list[tuple[int, str, float, float, float]] = []
    before = 0.0

    def run(iteration: int) -> None:
        clock.start()
        model.feed_data(batch)
        model.optimize_parameters(iteration)
        clock.switch(REST)

    with watched(model, clock):
        with one_thread(), FlopCounterMode(display=False) as counter:
            clock.counter = counter
            run(1)
            clock.counter = None
        for step in range(warmup + repeat):
            if step == warmup:
                clock.memory.start()
                before = clock.memory.peak()
            run(step + 2)
            if step >= warmup:
                rows += [
                    (step, part, clock.seconds[part], clock.flops.get(part, 0) / 1e9, clock.peaks[part])
                    for part in clock.seconds
                ]
    return pd.DataFrame(rows, columns=["step", "part", "seconds", "gflop", "peak_mib"]), before


def summary(measured: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of the report, as text: a row per part, their sum, and the whole step."""
    last = [ADAPTERS, REST]
    found = [part for part in dict.fromkeys([STUDENT, *measured["part"]]) if part not in last]
    parts = found + [part for part in last if part in set(measured["part"])]
    wholes = measured.groupby("step")["seconds"].sum().tolist()
    samples = {part: measured[measured["part"] == part]["seconds"].tolist() for part in parts}
    medians = {part: statistics.median(values) for part, values in samples.items()}
    total = sum(medians.values())
    peaks = measured.groupby("part")["peak_mib"].max()
    gflop = measured.groupby("part")["gflop"].first()
    table = pd.DataFrame(columns=["median s", "min–max s", "share", "GFLOP", "peak MiB"], dtype=object)
    for part in parts:
        values = samples[part]
        spread = f"{min(values):.3f}–{max(values):.3f}"
        table.loc[part] = [
            f"{medians[part]:.3f}",
            spread,
            f"{medians[part] / total:.1%}",
            f"{gflop[part]:,.1f}",
            mib(peaks[part]),
        ]
    table.loc["sum of the parts"] = [f"{total:.3f}", "", "100.0%", f"{gflop.sum():,.1f}", ""]
    spread = f"{min(wholes):.3f}–{max(wholes):.3f}"
    table.loc["whole step"] = [f"{statistics.median(wholes):.3f}", spread, "", "", mib(peaks.max())]
    table.index.name = "part"
    return table
