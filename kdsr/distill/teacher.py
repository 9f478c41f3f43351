"""Teacher: a frozen network that answers for several sets of images at once, with its tapped features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdsr.distill.padding import pad_and_restore
from kdsr.distill.step import Step
from kdsr.distill.taps import FeatureTaps, shapes_of


class Teacher:
    """A frozen network with the features that terms compare with.

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
        self.forget()
        return shapes

    @torch.no_grad()
    def answer(self, views: Mapping[str, Tensor], step: Step) -> None:
        """Restores views of images; fills ``teacher_outputs`` and ``teacher_features`` of the step.

        Views of the size of x need no padding and go through the network in one batch, others one by one.
        """
        together = {name: images for name, images in views.items() if images.shape[1:] == step.lq.shape[1:]}
        if together:
            self._pass(together, step, multiple_of=1)
        for name, images in views.items():
            if name not in together:
                self._pass({name: images}, step, self.multiple_of)

    def _pass(self, views: dict[str, Tensor], step: Step, multiple_of: int) -> None:
        batch = torch.cat([*views.values()]) if len(views) > 1 else next(iter(views.values()))
        outputs = pad_and_restore(self.net, batch, multiple_of, self.scale).to(step.lq.dtype)
        start = 0
        rows = {}
        for name, images in views.items():
            rows[name] = slice(start, start + len(images))
            step.teacher_outputs[name] = outputs[rows[name]]
            start += len(images)
        for group, (taps, view) in self._taps.items():
            if view in rows:
                step.teacher_features[group] = [feature[rows[view]] for feature in taps.take(batch)]
            else:
                taps.forget()

    def forget(self) -> None:
        """Drops what the taps have kept of the last pass."""
        for taps, _ in self._taps.values():
            taps.forget()
