"""Step: the data of one training step, which every term gets. Teacher: a frozen network that a step runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kdsr.distill.padding import pad_and_restore
from kdsr.distill.taps import FeatureTaps, shapes_of

CPU_PIXELS = 128 * 128  # of an extractor's pass without gradient, on each thread
X = "x"  # the view of a teacher that is the LQ batch itself


@dataclass
class Step:
    """The data of one training step. Every term gets it; its fields are filled from top to bottom.

    Attributes:
        iteration: Counted from 1.
        lq: (N, C, H, W) in [0, 1].
        gt: (N, C, H·scale, W·scale); None where the training set has no ground truth.
        generator: On the CPU, part of the training state. A term draws from it in ``prepare`` and ``before_student``.
        student: The bare student.
        student_ema: Its moving average; None where there is none.
        teacher_views: The images that a teacher gets in this step: by the teacher's key, then by the view's name.
        teacher_outputs: The teachers' outputs, by the view's name.
        teacher_features: The teachers' features, by tap group.
        student_inputs: The inputs of further passes of the student, by the pass's name.
        output: The student's output for ``lq``.
        student_features: Its adapted features, by tap group.
        results: The results of its further passes, by name.
        statistics: Scalars on the device that are logged beside the losses.
        kept: Anything that a term computes early in a step and needs later, by the term's key.
    """

    iteration: int
    lq: Tensor
    gt: Tensor | None
    generator: torch.Generator
    student: nn.Module
    student_ema: nn.Module | None = None
    teacher_views: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    teacher_outputs: dict[str, Tensor] = field(default_factory=dict)
    teacher_features: dict[str, list[Tensor]] = field(default_factory=dict)
    student_inputs: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    student_features: dict[str, list[Tensor]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    _extracted: dict[tuple[int, int], tuple[Tensor, Any, int | None]] = field(default_factory=dict)

    @property
    def ground_truth(self) -> Tensor:
        """``gt``, for terms that cannot do without it (``NEEDS`` has ``gt``)."""
        assert self.gt is not None
        return self.gt

    @property
    def teacher_output(self) -> Tensor:
        """T(x), for terms with ``teacher_output`` in ``NEEDS``."""
        return self.teacher_outputs[X]

    def show_teacher(self, view: str, images: Tensor, teacher: str = "t") -> None:
        """Adds images of any size to the input of a teacher in this step; called in ``prepare``.

        Args:
            view: The name of its output in ``teacher_outputs``.
            images: (N, C, H, W). Views of the same size go through the network in one batch.
            teacher: The network's key: ``t`` for ``network_t``.
        """
        self.teacher_views.setdefault(teacher, {})[view] = images

    def release(self) -> None:
        """Frees memory at the end of a step: only outputs and statistics stay."""
        held: tuple[dict[Any, Any], ...] = (
            self.teacher_views, self.teacher_features, self.student_inputs, self.student_features,
            self.results, self.kept, self._extracted,
        )  # fmt: skip
        for tensors in held:
            tensors.clear()

    def extract(
        self, network: nn.Module, *image_sets: Tensor, chunk: int | None = None, levels: int | None = None
    ) -> list[Any]:
        """The outputs of a frozen extractor for sets of images: one pass per set and step, however many terms ask.

        Args:
            network: Maps images to a tensor, or to (nested) lists and tuples of tensors, a row per image.
            image_sets: (N, C, H, W) each, of one size.
            chunk: Images per pass of those without a gradient (default see ``images_per_pass``).
            levels: Only so many levels of features are needed, the first ones; networks whose ``forward`` has an
                argument of this name end there. There may be more.
        """
        new = [images for images in image_sets if not self._has(network, images, levels)]
        run: Callable[[Tensor], Any] = network
        if levels is not None and "levels" in signature(network.forward).parameters:
            run = partial(network, levels=levels)
        frozen = [images for images in new if not images.requires_grad]
        if frozen:
            batch = torch.cat(frozen) if len(frozen) > 1 else frozen[0]
            with torch.no_grad():
                outputs = [run(part) for part in batch.split(chunk or images_per_pass(batch))]
            whole = tree_map(lambda *parts: torch.cat(parts) if len(parts) > 1 else parts[0], *outputs)
            start = 0
            for images in frozen:
                rows = slice(start, start + len(images))
                part = tree_map(itemgetter(rows), whole)
                self._extracted[id(network), id(images)] = images, part, levels
                start += len(images)
        for images in new:
            if images.requires_grad:
                self._extracted[id(network), id(images)] = images, run(images), levels
        return [self._extracted[id(network), id(images)][1] for images in image_sets]

    def _has(self, network: nn.Module, images: Tensor, levels: int | None) -> bool:
        if (id(network), id(images)) not in self._extracted:
            return False
        there = self._extracted[id(network), id(images)][2]
        return there is None or (levels is not None and levels <= there)

    def code_logits(self, vqgan: Any, *image_sets: Tensor, chunk: int | None = None) -> list[Tensor]:
        """The code logits of a VQGAN for sets of images, from the features that ``extract`` has or computes."""
        found = []
        new = [images for images in image_sets if not self._has(vqgan, images, 1)]
        if new:
            self.extract(vqgan, *new, chunk=chunk)
        for images in image_sets:
            key = id(vqgan.quantize), id(images)
            if key not in self._extracted:
                features = self._extracted[id(vqgan), id(images)][1]  # of the first levels or of all
                with torch.set_grad_enabled(images.requires_grad):
                    self._extracted[key] = images, vqgan.code_logits(features), None
            found.append(self._extracted[key][1])
        return found


def images_per_pass(images: Tensor) -> int:
    """How many images at once are fastest for an extractor without gradient.

    All on a GPU. On a CPU as many as have together 128x128 pixels on each thread, which takes less memory and is no
    slower than larger batches (docs/benchmarks.md, "Levers").
    """
    if images.device.type != "cpu":
        return len(images)
    return max(1, CPU_PIXELS // (images.shape[-2] * images.shape[-1])) * torch.get_num_threads()


class Teacher:
    """A frozen network, with the features of it that terms use.

    Args:
        net: In eval mode, without gradients.
        multiple_of: What the sides of its images must be divisible by.
        scale: Its upscaling factor.
    """

    def __init__(self, net: nn.Module, multiple_of: int, scale: int) -> None:
        self.net = net
        self.multiple_of = multiple_of
        self.scale = scale
        self._taps: dict[str, tuple[FeatureTaps, str]] = {}  # by tap group, with the view that it is of

    def tap(self, group: str, names: Sequence[str], option: str, view: str, lq: Tensor) -> list[torch.Size]:
        """Taps features for a group, and returns their shapes for images like ``lq``.

        Raises:
            OptionError: There is no such module, or it gives no feature map.
        """
        taps = FeatureTaps(self.net, names, option)
        self._taps[group] = taps, view
        shapes = shapes_of(self.net, taps, lq)
        self.clear()
        return shapes

    @torch.no_grad()
    def run(self, views: Mapping[str, Tensor], step: Step) -> None:
        """Restores views of images and fills ``teacher_outputs`` and ``teacher_features`` of the step.

        Views of the size of x need no padding and go through the network in one batch, others one by one.
        """
        together = {name: images for name, images in views.items() if images.shape[1:] == step.lq.shape[1:]}
        if together:
            self._pass(together, step, pad=False)
        for name, images in views.items():
            if name not in together:
                self._pass({name: images}, step, pad=True)

    def _pass(self, views: dict[str, Tensor], step: Step, pad: bool) -> None:
        batch = torch.cat([*views.values()]) if len(views) > 1 else next(iter(views.values()))
        outputs = pad_and_restore(self.net, batch, self.multiple_of, self.scale) if pad else self.net(batch)
        outputs = outputs.to(step.lq.dtype)
        start = 0
        rows = {}
        for name, images in views.items():
            rows[name] = slice(start, start + len(images))
            step.teacher_outputs[name] = outputs[rows[name]]
            start += len(images)
        for group, (taps, view) in self._taps.items():
            if view in rows:
                features = [feature[rows[view]] for feature in taps.take(batch)]
                step.teacher_features[group] = [feature.to(step.lq.dtype) for feature in features]
            else:
                taps.clear()

    def clear(self) -> None:
        """Drops the features of the last pass."""
        for taps, _ in self._taps.values():
            taps.clear()
