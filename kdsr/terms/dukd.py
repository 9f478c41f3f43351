"""DUKD's data upcycling: the student also learns from zoomed-in and zoomed-out views of a training pair.

Zhang et al., "Data Upcycling Knowledge Distillation for Image Super-Resolution" (arXiv 2309.14162). Our
interpretation and differences from the release are in docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdsr.data.resize import bicubic_taps
from kdsr.distill.padding import pad_and_restore
from kdsr.distill.step import Step
from kdsr.distill.term import TERM_REGISTRY, Setup, Shapes, Term
from kdsr.runtime.declarations import Options, Section, loss, option
from kdsr.terms.label_consistency import AugmentationOptions, LabelConsistency


def random_crops(images: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Crops each image at random, (N, C, height, width); positions are drawn from a CPU generator."""
    room = torch.tensor([images.shape[2] - height + 1, images.shape[3] - width + 1])
    places = (torch.rand(len(images), 2, generator=generator, dtype=torch.float64) * room).long().tolist()
    crops = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(images, places, strict=True)]
    return torch.stack(crops)


@cache
def _taps(length: int, scale: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    index, weight = bicubic_taps(length, length // scale, 1 / scale, "symmetric")
    return torch.from_numpy(index).to(device), torch.from_numpy(weight).to(device, dtype)


def zoomed_out(lq: Tensor, scale: int) -> Tensor:
    """``x↓``: downsamples (N, C, H, W) like Matlab's ``imresize(x, 1/scale)``: bicubic, antialiased, mirrored border.

    As in the release, nothing is rounded or clipped, so edges overshoot. Sides are cropped to multiples of ``scale``.
    """
    height, width = (size - size % scale for size in lq.shape[2:])
    small = lq[..., :height, :width].to(torch.promote_types(lq.dtype, torch.float32))
    for _ in range(2):  # columns, then rows; no matrix product, which a GPU may compute in TF32
        index, weight = _taps(small.shape[3], scale, small.dtype, small.device)
        small = (small[..., index] * weight).sum(-1).transpose(2, 3)
    return small


class _Restored(nn.Module):
    """A pass of the student on images of any size."""

    def __init__(self, multiple_of: int, scale: int) -> None:
        super().__init__()
        self.multiple_of, self.scale = multiple_of, scale

    def forward(self, student: nn.Module, images: Tensor) -> Tensor:
        return pad_and_restore(student, images, self.multiple_of, self.scale)


class _Zoom(Term):
    """A term with one further pass of the student, called ``NAME``."""

    NAME: ClassVar[str]
    COMPARES_IMAGES = True

    def passes(self, shapes: Mapping[str, Shapes]) -> dict[str, nn.Module]:
        return {self.NAME: _Restored(self.setup.multiple_of(self.setup.student), self.setup.scale)}

    def student_output(self, step: Step) -> Tensor:
        """Returns the student's output for the view, (N, C, H·scale, W·scale)."""
        return step.results[self.NAME].to(step.lq.dtype)


class ZoomInOptions(AugmentationOptions):
    zoom_in_opt: Section | None = loss("DUKD's loss on crops of the ground truth, `l_zoom_in`.")


@TERM_REGISTRY.register()
class ZoomInTerm(_Zoom):
    """``l_zoom_in = L1(A⁻¹ S(A y_c), T(y_c))``: y_c is a crop of the ground truth as large as x.

    A is drawn as for label consistency (``train.noisy.prob``) and inverted in reverse order.
    """

    KEY, NAME = "zoom_in_opt", "zoom_in"
    options = ZoomInOptions
    NEEDS = frozenset({"teacher", "gt"})

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.augmentation = LabelConsistency(self.options.noisy.prob)

    def prepare(self, step: Step) -> None:
        height, width = step.lq.shape[2:]
        crops = random_crops(step.ground_truth, height, width, step.generator)
        plan = self.augmentation.draw(len(crops), step.generator)
        step.kept[self.KEY] = plan
        step.student_inputs[self.NAME] = (self.augmentation.apply(crops, plan),)
        step.show_teacher(self.NAME, crops)

    def losses(self, step: Step) -> dict[str, Tensor]:
        output = self.augmentation.invert(self.student_output(step), step.kept[self.KEY])
        return {"l_zoom_in": self.loss(output, step.teacher_outputs[self.NAME])}


class ZoomOutOptions(Options):
    zoom_out_opt: Section | None = loss(
        "DUKD's loss on downsampled LQ images, `l_zoom_out`; for scale 2 and above."
    )
    zoom_out_gt_weight: float = option(
        1.0, "Weight of the part of `l_zoom_out` against the LQ image.", lowest=0
    )


@TERM_REGISTRY.register()
class ZoomOutTerm(_Zoom):
    """``l_zoom_out = w · L1(S(x↓), x) + L1(S(x↓), T(x↓))``: x itself is the ground truth of a smaller x↓.

    w is ``train.zoom_out_gt_weight`` (default 1; in the release the weight of the pixel loss). Without a teacher, only
    the first part is used.
    """

    KEY, NAME = "zoom_out_opt", "zoom_out"
    options = ZoomOutOptions

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        scale = opt.get("scale", 1)
        if scale < 2:
            return [
                f"train.{cls.KEY}: downsamples x by the scale, which is {scale}; it is for super-resolution only"
            ]
        train = (opt.get("datasets") or {}).get("train") or {}
        patch = train.get("gt_size", scale * scale) // scale
        if patch < scale:
            return [
                f"train.{cls.KEY}: LQ patches of {patch} pixels are too small for scale {scale}; raise gt_size"
            ]
        return []

    def prepare(self, step: Step) -> None:
        small = zoomed_out(step.lq, self.setup.scale)
        step.student_inputs[self.NAME] = (small,)
        if self.setup.opt.get("network_t"):
            step.show_teacher(self.NAME, small)

    def losses(self, step: Step) -> dict[str, Tensor]:
        output = self.student_output(step)
        height, width = output.shape[2:]
        loss = self.options.zoom_out_gt_weight * self.loss(output, step.lq[..., :height, :width])
        if self.NAME in step.teacher_outputs:
            loss = loss + self.loss(output, step.teacher_outputs[self.NAME])
        return {"l_zoom_out": loss}
