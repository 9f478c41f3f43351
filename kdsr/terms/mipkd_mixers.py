"""MiPKD's mixers: of features of student and teacher in a latent space, and of blocks of the two networks.

Li et al., "Knowledge Distillation with Multi-granularity Mixture of Priors for Image Super-Resolution", ICLR 2025
(arXiv 2404.02573). Encoders, decoder and the bridges between widths are our interpretation (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.distill.adapters import TapPair, resized_like
from kdsr.distill.taps import module_names
from kdsr.runtime.errors import OptionError

# ------------------------------------------------------------------------------------------------------- features


def draw_mask(shape: torch.Size, ratio: float, seed: int, device: torch.device) -> Tensor:
    """Draws a mask that is true (teacher) with probability ``ratio``, independently per element.

    It is drawn on the device, because features may have tens of millions of elements. The seed comes from a generator
    of the training state.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(shape, generator=generator, device=device) < ratio


def mixed(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """``M ⊙ theirs + (1 − M) ⊙ ours``; all have the same shape."""
    return torch.where(mask, theirs, ours)


class FeatureMixer(nn.Module):
    """Encodes a student's and a teacher's feature to latents of the teacher's width, mixes and decodes them.

    Args:
        channels: Channels of the student's feature.
        teacher_channels: Channels of the teacher's feature.
    """

    def __init__(self, channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.student = nn.Conv2d(channels, teacher_channels, 1)
        self.teacher = nn.Conv2d(teacher_channels, teacher_channels, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(self, feature: Tensor, teacher_feature: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features decoded from the mixture and from the teacher's latent.

        Args:
            feature: The student's feature, (N, C, H, W).
            teacher_feature: The teacher's feature, (N, C_T, H, W).
            mask: True where the teacher's latent is used, (N, C_T, H, W).
        """
        latent = self.teacher(teacher_feature)
        mixture = mixed(self.student(feature), latent, mask)
        whole, own = self.decoder(torch.cat([mixture, latent])).chunk(2)
        return whole, own


class FeatureMixing(nn.Module):
    """A pass that mixes the student's tapped features with the teacher's, see ``StudentBundle``.

    Args:
        group: Name of the tap group of the student's features.
        ours: Shapes of the student's features.
        theirs: Shapes of the teacher's features.
    """

    def __init__(self, group: str, ours: Sequence[torch.Size], theirs: Sequence[torch.Size]) -> None:
        super().__init__()
        self.group = group
        self.mixers = nn.ModuleList(FeatureMixer(s[1], t[1]) for s, t in zip(ours, theirs, strict=True))

    def forward(
        self,
        student: nn.Module,
        features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the decoded mixture and the decoded teacher latent of each tap."""
        sized = resized_like(features, teacher_features)
        inputs = zip(self.mixers, sized, teacher_features, masks, strict=True)
        decoded = [mixer(*views) for mixer, *views in inputs]
        return [mixture for mixture, _ in decoded], [own for _, own in decoded]


# --------------------------------------------------------------------------------------------------------- blocks


class Bridge(nn.Conv2d):
    """A 1×1 convolution for features (N, C, H, W) or tokens (N, L, C)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return F.linear(x, self.weight.flatten(1), self.bias)
        return super().forward(x)


def bridges(ours: tuple[int, int], theirs: tuple[int, int]) -> tuple[nn.Module, nn.Module]:
    """Returns bridges to the width of a teacher's block and back; identities if the widths are equal.

    If the teacher is wider, they are initialised with an isometry and its transpose, so that the skip connection of a
    residual block is preserved.

    Args:
        ours: Input and output channels of the student's block.
        theirs: Input and output channels of the teacher's block.
    """
    there, back = (
        nn.Identity() if sizes[0] == sizes[1] else Bridge(*sizes)
        for sizes in ((ours[0], theirs[0]), (theirs[1], ours[1]))
    )
    for bridge in (there, back):
        if isinstance(bridge, Bridge):
            assert bridge.bias is not None
            nn.init.orthogonal_(bridge.weight)
            nn.init.zeros_(bridge.bias)
    if (
        isinstance(there, Bridge)
        and isinstance(back, Bridge)
        and ours[0] == ours[1]
        and theirs[0] == theirs[1]
    ):
        with torch.no_grad():
            back.weight.copy_(there.weight.transpose(0, 1))
    return there, back


class BlockMixing(nn.Module):
    """A pass of the student with some blocks replaced by frozen blocks of the teacher.

    The teacher's blocks are not part of this module; the gradient passes through them to the student. Unused bridges
    get a gradient of 0, so that each step uses all parameters (DDP).

    Args:
        option: The option that lists the pairs, for messages.
        pairs: Names of a student's block and of the teacher's block that may replace it.
        student: The bare student.
        teacher: The bare, frozen teacher.
        lq: A batch of the training size, (1, C, H, W).

    Raises:
        OptionError: A block does not exist, does not map features to features, or a pair does not fit.
    """

    def __init__(
        self, option: str, pairs: Sequence[TapPair], student: nn.Module, teacher: nn.Module, lq: Tensor
    ) -> None:
        super().__init__()
        self.names = module_names(student, [pair.student for pair in pairs], f"{option}.student")
        teacher_names = module_names(teacher, [pair.teacher for pair in pairs], f"{option}.teacher")
        if len(set(self.names)) < len(self.names):
            raise OptionError(
                f"{option}: lists a block of the student twice ({', '.join(self.names)}); list each once"
            )
        ours = _shapes(student, self.names, f"{option}.student", lq)
        theirs = _shapes(teacher, teacher_names, f"{option}.teacher", lq)
        problems = [
            problem
            for fitted in zip(pairs, ours, theirs, strict=True)
            if (problem := _misfit(option, *fitted)) is not None
        ]
        if problems:
            raise OptionError(problems)
        made = [bridges(_widths(s), _widths(t)) for s, t in zip(ours, theirs, strict=True)]
        self.there = nn.ModuleList(there for there, _ in made)
        self.back = nn.ModuleList(back for _, back in made)
        self._blocks = tuple(
            teacher.get_submodule(name) for name in teacher_names
        )  # in a tuple, to not register them

    def forward(self, student: nn.Module, lq: Tensor, taken: Sequence[bool]) -> Tensor:
        """Returns the output of the mixed network; ``taken``: whether the teacher's block is used, per pair."""
        with ExitStack() as stack:
            for index, name in enumerate(self.names):
                if taken[index]:
                    block = student.get_submodule(name)
                    stack.enter_context(_standing_in(block, partial(self._through, index)))
            output = student(lq)
        left_out = [
            parameter.sum()
            for index, was_taken in enumerate(taken)
            if not was_taken
            for parameter in (*self.there[index].parameters(), *self.back[index].parameters())
        ]
        return output + 0 * torch.stack(left_out).sum() if left_out else output

    def _through(self, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.back[index](self._blocks[index](self.there[index](x), *args, **kwargs))


@contextmanager
def _standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's ``forward``; its hooks are still called."""
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


Shapes = tuple[torch.Size, torch.Size]  # of a block's input and output


@torch.no_grad()
def _shapes(net: nn.Module, names: Sequence[str], option: str, lq: Tensor) -> list[Shapes]:
    modules = dict(net.named_modules())
    seen: dict[str, tuple[Any, Any]] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen[name] = (inputs[0] if inputs else None, output)

    handles = [modules[name].register_forward_hook(partial(note, name)) for name in names]
    training = net.training
    net.eval()
    try:
        net(lq)
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    problems = [
        f"{option}: {name} {'maps no features to features' if name in seen else 'was not called'}; give a block of "
        "the body, which maps (N, C, H, W) or tokens (N, L, C)"
        for name in names
        if not all(map(_is_feature, seen.get(name, (None,))))
    ]
    if problems:
        raise OptionError(problems)
    return [(seen[name][0].shape, seen[name][1].shape) for name in names]


def _is_feature(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() in (3, 4)


def _widths(shapes: Shapes) -> tuple[int, int]:
    """Returns input and output channels of a block; of tokens the last dimension."""
    taken, given = (shape[1] if len(shape) == 4 else shape[-1] for shape in shapes)
    return taken, given


def _misfit(option: str, pair: TapPair, ours: Shapes, theirs: Shapes) -> str | None:
    def places(shape: torch.Size) -> list[int]:
        return [shape[0], *shape[2:]] if len(shape) == 4 else [*shape[:2]]

    if all(places(s) == places(t) for s, t in zip(ours, theirs, strict=True)):
        return None
    shown = [" to ".join("x".join(map(str, shape)) for shape in shapes) for shapes in (ours, theirs)]
    return (
        f"{option}: the student's {pair.student} maps {shown[0]}, the teacher's {pair.teacher} {shown[1]}; except for "
        "the channels these must be equal; pair blocks of the same level"
    )
