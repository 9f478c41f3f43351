"""DUKD's upcycled data: the student also learns from what zooming in and out makes of a training pair.

Zhang et al., "Data Upcycling Knowledge Distillation for Image Super-Resolution" (arXiv 2309.14162). Our reading, and
where it leaves the release, is in docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdsr.models.evaluation import pad_and_restore
from kdsr.models.terms.term import Term


def random_crops(images: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """One crop of each image, (N, C, height, width); the places are drawn from a generator of the CPU."""
    room = torch.tensor([images.shape[2] - height + 1, images.shape[3] - width + 1])
    places = (torch.rand(len(images), 2, generator=generator, dtype=torch.float64) * room).long().tolist()
    crops = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(images, places, strict=True)]
    return torch.stack(crops)


def zoomed_out(lq: Tensor, scale: int) -> Tensor:
    """``x↓ = bicubic(x, 1/scale)``, in [0, 1]; sides that ``scale`` does not divide lose their last pixels."""
    height, width = (size // scale for size in lq.shape[2:])
    whole = lq[..., : height * scale, : width * scale]
    return F.interpolate(whole.float(), (height, width), mode="bicubic", antialias=True).clamp(0, 1)


class _Restored(nn.Module):
    """A pass of the student over images of any size."""

    def __init__(self, multiple_of: int, scale: int) -> None:
        super().__init__()
        self.multiple_of, self.scale = multiple_of, scale

    def forward(self, student: nn.Module, images: Tensor) -> Tensor:
        return pad_and_restore(student, images, self.multiple_of, self.scale)


class _Zoom(Term):
    """A term with one further pass of the student, of the term's own name."""

    NAME: str

    def passes(self) -> dict[str, nn.Module]:
        model = self.model
        return {self.NAME: _Restored(model.size_multiple(model.net_g), model.opt.get("scale") or 1)}

    @property
    def answer(self) -> Tensor:
        """What the student made of the view, (N, C, H·scale, W·scale)."""
        assert self.model.student_bundle is not None
        return self.model.student_bundle.results[self.NAME].to(self.model.lq.dtype)


class ZoomInTerm(_Zoom):
    """``l_zoom_in = L1(A⁻¹ S(A y_c), T(y_c))``: y_c is a crop of the ground truth as large as x.

    A is drawn as for the label consistency (``train.noisy.prob``), and undone in the reverse order.
    """

    KEY, NAME = "zoom_in_opt", "zoom_in"
    TRAIN_KEYS = {KEY: (dict, type(None))}
    NEEDS = frozenset({"teacher", "gt"})

    def prepare(self) -> dict[str, tuple[Any, ...]]:
        model = self.model
        height, width = model.lq.shape[2:]
        self.crops = random_crops(model.gt, height, width, model.generator)
        self.plan = model.augmentation.draw(len(self.crops), model.generator)
        return {self.NAME: (model.augmentation.apply(self.crops, self.plan),)}

    def teacher_views(self) -> Sequence[Tensor]:
        return [self.crops]

    def losses(self, current_iter: int, taught: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"l_zoom_in": self.cri(self.model.augmentation.invert(self.answer, self.plan), taught[0])}


class ZoomOutTerm(_Zoom):
    """``l_zoom_out = L1(S(x↓), x) + L1(S(x↓), T(x↓))``: x itself is the ground truth of a smaller x↓.

    Without a teacher the first half remains.
    """

    KEY, NAME = "zoom_out_opt", "zoom_out"
    TRAIN_KEYS = {KEY: (dict, type(None))}

    @classmethod
    def problems(cls, opt: dict[str, Any]) -> list[str]:
        scale = opt.get("scale", 1)
        if scale < 2:
            return [f"train.{cls.KEY}: shrinks x by the scale, which is {scale}; it is for super-resolution"]
        train = (opt.get("datasets") or {}).get("train") or {}
        patch = train.get("gt_size", scale * scale) // scale
        if patch < scale:
            return [f"train.{cls.KEY}: nothing is left of LQ patches of {patch} pixels, shrunk by {scale}"]
        return []

    def prepare(self) -> dict[str, tuple[Any, ...]]:
        self.small = zoomed_out(self.model.lq, self.model.opt["scale"])
        return {self.NAME: (self.small,)}

    def teacher_views(self) -> Sequence[Tensor]:
        return [self.small] if self.model.net_t is not None else ()

    def losses(self, current_iter: int, taught: Sequence[Tensor]) -> dict[str, Tensor]:
        height, width = self.answer.shape[2:]
        loss = self.cri(self.answer, self.model.lq[..., :height, :width])
        if taught:
            loss = loss + self.cri(self.answer, taught[0])
        return {"l_zoom_out": loss}
