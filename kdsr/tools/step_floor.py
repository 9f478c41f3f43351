"""The floor of a training step: the sum of the best times of its networks, each measured alone, and of the update.

A network's best time is found over the images per pass and the memory layout. Its calls are those of a real step: the
same images, arguments and autocast. Losses, degradations and adapters are not part of the floor.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from kdsr.tools.step_clock import now
from kdsr.tools.step_parts import FURTHER_PASS, STUDENT, WITH_GRADIENT, networks_by_part

UPDATE = "optimizer and EMA"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FINALISTS, ROUNDS = 2, 3  # the settings that are measured again, and how often


@dataclass
class Calls:
    """The calls of a network in a step that differ only in their images.

    Attributes:
        part: Its name in the report.
        net: The network.
        function: It, or its further pass.
        others: Keyword arguments.
        gradient: Whether a backward pass follows: to the weights of the student, to the inputs of others.
        autocast: The dtype of autocast; None without.
        batches: Of an iteration (``train.accumulate``); what exceeds the images of one may not fit into memory.
        inputs: The arguments of each call: tensors, or lists of them, whose rows belong to images.
    """

    part: str
    net: nn.Module
    function: Callable[..., Any]
    others: dict[str, Any]
    gradient: bool
    autocast: torch.dtype | None
    batches: int = 1
    inputs: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def images(self) -> int:
        return sum(len(tree_leaves(inputs)[0]) for inputs in self.inputs)

    def seconds(self, chunk: int, layout: torch.memory_format) -> float:
        """Runs all images, ``chunk`` per pass, forward and backward."""
        self.net.to(memory_format=layout)  # type: ignore[call-overload]
        self.net.zero_grad(set_to_none=True)
        leaves = [torch.cat(parts) for parts in zip(*map(tree_leaves, self.inputs), strict=True)]
        passes = zip(*(leaf.contiguous(memory_format=layout).split(chunk) for leaf in leaves), strict=True)
        structure = tree_structure(self.inputs[0])
        to_inputs = self.gradient and self.part != STUDENT
        device = leaves[0].device
        start = now(device)
        with (
            torch.autocast(device.type, self.autocast, enabled=self.autocast is not None),
            torch.set_grad_enabled(self.gradient),
        ):
            for tensors in passes:
                inputs = [tensor.detach().requires_grad_(to_inputs) for tensor in tensors]
                outputs = self.function(*tree_unflatten(inputs, structure), **self.others)
                if self.gradient:
                    ends = [output for output in tree_leaves(outputs) if output.requires_grad]
                    torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
        return now(device) - start


@dataclass(frozen=True)
class Best:
    """A row of the floor: images, the images per pass and the layout that were fastest, and seconds."""

    part: str
    images: int | None
    chunk: int | None
    layout: str | None
    seconds: float


def calls_of(model: Any, step: Callable[[], None]) -> list[Calls]:
    """Records the calls of a model's networks in a step."""
    found: dict[str, Calls] = {}

    def note(net: nn.Module, part: str, function: Callable[..., Any], inputs: Any, others: Any) -> None:
        inputs = tree_map(Tensor.detach, inputs)
        device = tree_leaves(inputs)[0].device.type
        gradient = torch.is_grad_enabled()
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        name = WITH_GRADIENT.format(part) if gradient and part != STUDENT else part
        key = f"{name} {others} {[tuple(leaf.shape[1:]) for leaf in tree_leaves(inputs)]}"
        calls = found.setdefault(
            key, Calls(name, net, function, others, gradient, autocast, model.accumulate)
        )
        calls.inputs.append(inputs)

    with ExitStack() as undo:
        for net, part in networks_by_part(model).items():
            hook = partial(lambda part, net, inputs, others: note(net, part, net, inputs, others), part)
            undo.callback(net.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if (further := getattr(net, FURTHER_PASS, None)) is not None:

                def noted(*inputs: Any, net: Any = net, part: str = part, further: Any = further) -> Any:
                    note(net, f"{part}, codes", further, inputs, {})
                    return further(*inputs)

                setattr(net, FURTHER_PASS, noted)
                undo.callback(delattr, net, FURTHER_PASS)
        step()
    return [*found.values()]


def chunk_sizes(images: int) -> list[int]:
    """All up to 8; for more images powers of two, and all at once."""
    return [size for size in range(1, images + 1) if images <= 8 or size == images or not size & (size - 1)]


def best_of(calls: Calls) -> Best:
    """Finds the fastest setting: one run of each, then the fastest again, in turn."""
    of_a_batch = -(-calls.images // calls.batches)
    first = {
        (chunk, layout): calls.seconds(chunk, form)
        for layout, form in LAYOUTS.items()
        for chunk in chunk_sizes(of_a_batch)
    }
    finalists = sorted(first, key=first.__getitem__)[:FINALISTS]
    runs: dict[tuple[int, str], list[float]] = {setting: [] for setting in finalists}
    for _ in range(ROUNDS):
        for chunk, layout in finalists:
            runs[chunk, layout].append(calls.seconds(chunk, LAYOUTS[layout]))
    medians = {setting: statistics.median(values) for setting, values in runs.items()}
    (chunk, layout), seconds = min(medians.items(), key=lambda item: item[1])
    return Best(calls.part, calls.images, chunk, layout, seconds)


def update_of(model: Any, iteration: int) -> Best:
    """Time of the optimizers and the moving average, with the gradients of the last backward pass."""
    runs = []
    for _ in range(ROUNDS):
        start = now(model.device)
        for optimizer in model.trainer.optimizers:
            optimizer.step()
        if model.ema:
            model.ema.update(iteration, model.guard)
        runs.append(now(model.device) - start)
    return Best(UPDATE, None, None, None, statistics.median(runs))


def floor(model: Any, batch: dict[str, Tensor], iteration: int = 1) -> list[Best]:
    """Measures the parts of the floor; the model is of no use afterwards."""

    def step() -> None:
        model.feed_data(batch)
        model.optimize_parameters(iteration)

    step()  # the first step of an optimizer makes its state
    update = update_of(model, iteration)
    return [*map(best_of, calls_of(model, step)), update]


def table(rows: list[Best], step: float) -> pd.DataFrame:
    """The report as text, with the seconds of a whole step beside the floor."""
    found = pd.DataFrame(columns=["images", "images per pass", "layout", "s"], dtype=object)
    for row in rows:
        cells = ["" if value is None else str(value) for value in (row.images, row.chunk, row.layout)]
        label = row.part if row.part not in found.index else f"{row.part}, other arguments"
        found.loc[label] = [*cells, f"{row.seconds:.3f}"]
    total = sum(row.seconds for row in rows)
    found.loc["floor"] = ["", "", "", f"{total:.3f}"]
    found.loc["whole step"] = ["", "", "", f"{step:.3f}"]
    found.loc["step ÷ floor"] = ["", "", "", f"{step / total:.3f}"]
    found.index.name = "part alone, at its best"
    return found
