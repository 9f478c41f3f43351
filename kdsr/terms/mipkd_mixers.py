"""What MiPKD mixes: features of student and teacher in a latent space, and whole blocks of the two networks.

Li et al., "Knowledge Distillation with Multi-granularity Mixture of Priors for Image Super-Resolution", ICLR 2025
(arXiv 2404.02573). Encoders, decoder and the bridges between widths are our reading (docs/methods.md).
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
    """Independent for each element: true, for the teacher, with a probability of ``ratio``.

    Drawn on the device (the features of a batch have tens of millions of elements), from a seed that comes from a
    generator of the training state.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(shape, generator=generator, device=device) < ratio


def mixed(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """``M ⊙ theirs + (1 − M) ⊙ ours``, all of one shape."""
    return torch.where(mask, theirs, ours)


class FeatureMixer(nn.Module):
    """Encoders of a student's and a teacher's feature to a latent of the teacher's width, and the decoder of both.

    Args:
        channels: Of the student's feature.
        taught: Of the teacher's.
    """

    def __init__(self, channels: int, taught: int) -> None:
        super().__init__()
        self.student = nn.Conv2d(channels, taught, 1)
        self.teacher = nn.Conv2d(taught, taught, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(taught, taught, 3, padding=1), nn.ReLU(), nn.Conv2d(taught, taught, 3, padding=1)
        )

    def forward(self, feature: Tensor, taught: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What is decoded from the mixture, and from the teacher's latent alone.

        Args:
            feature: The student's, (N, C, H, W).
            taught: The teacher's, (N, C_T, H, W).
            mask: True where the latent is the teacher's, of the teacher's shape.
        """
        latent = self.teacher(taught)
        mixture = mixed(self.student(feature), latent, mask)
        whole, own = self.decoder(torch.cat([mixture, latent])).chunk(2)
        return whole, own


class FeatureMixing(nn.Module):
    """A pass that mixes the student's tapped features with the teacher's, see ``StudentBundle``.

    Args:
        group: Name of the group of the student's features.
        ours: Shapes of the student's features.
        theirs: Shapes of the teacher's.
    """

    def __init__(self, group: str, ours: Sequence[torch.Size], theirs: Sequence[torch.Size]) -> None:
        super().__init__()
        self.group = group
        self.mixers = nn.ModuleList(FeatureMixer(s[1], t[1]) for s, t in zip(ours, theirs, strict=True))

    def forward(
        self,
        student: nn.Module,
        features: Sequence[Tensor],
        taught: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One decoded mixture, and one decoded latent of the teacher, per tap."""
        sized = resized_like(features, taught)
        decoded = [mixer(*views) for mixer, *views in zip(self.mixers, sized, taught, masks, strict=True)]
        return [mixture for mixture, _ in decoded], [own for _, own in decoded]


# --------------------------------------------------------------------------------------------------------- blocks


class Bridge(nn.Conv2d):
    """A 1×1 convolution of maps (N, C, H, W), or of a transformer's tokens (N, L, C)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return F.linear(x, self.weight.flatten(1), self.bias)
        return super().forward(x)


def bridges(ours: tuple[int, int], theirs: tuple[int, int]) -> tuple[nn.Module, nn.Module]:
    """To the width of a teacher's block and back; where the widths are the same, nothing.

    They begin as an isometry and its transpose, where the teacher is wider: what a residual block adds to then
    comes back as it was.

    Args:
        ours: Channels that the student's block takes and gives.
        theirs: Those of the teacher's.
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
    """A pass in which the student's features go on through blocks of the teacher where a draw says so.

    The teacher's blocks stay frozen and are no part of this module: the gradient passes through them to the
    student. Bridges that a draw leaves out get a gradient of 0, so that each step uses the same parameters.

    Args:
        option: The option that lists the pairs, for messages.
        pairs: Names of a student's block and of the teacher's that may stand in for it.
        student: The bare network.
        teacher: The bare, frozen network.
        lq: A batch of the size that training sees, (1, C, H, W).

    Raises:
        OptionError: A block does not exist, is no block of features, or the two of a pair do not fit.
    """

    def __init__(
        self, option: str, pairs: Sequence[TapPair], student: nn.Module, teacher: nn.Module, lq: Tensor
    ) -> None:
        super().__init__()
        self.names = module_names(student, [pair.student for pair in pairs], f"{option}.student")
        taught = module_names(teacher, [pair.teacher for pair in pairs], f"{option}.teacher")
        if len(set(self.names)) < len(self.names):
            raise OptionError(
                f"{option}: names a block of the student twice ({', '.join(self.names)}); each has one of the teacher's"
            )
        ours = _shapes(student, self.names, f"{option}.student", lq)
        theirs = _shapes(teacher, taught, f"{option}.teacher", lq)
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
        self._blocks = tuple(teacher.get_submodule(name) for name in taught)  # a tuple: not registered

    def forward(self, student: nn.Module, lq: Tensor, taken: Sequence[bool]) -> Tensor:
        """The output of the mixed network; ``taken``: for each pair whether the teacher's block is."""
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
    """Another function for a module's own ``forward``, which its hooks are called around as ever."""
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


Shapes = tuple[torch.Size, torch.Size]  # of what a block takes, and of what it gives


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
        f"{option}: {name} {'maps no features to features' if name in seen else 'was not called'}; name a block of "
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
    """Channels that a block takes and gives; the last dimension of tokens."""
    taken, given = (shape[1] if len(shape) == 4 else shape[-1] for shape in shapes)
    return taken, given


def _misfit(option: str, pair: TapPair, ours: Shapes, theirs: Shapes) -> str | None:
    def places(shape: torch.Size) -> list[int]:
        return [shape[0], *shape[2:]] if len(shape) == 4 else [*shape[:2]]

    if all(places(s) == places(t) for s, t in zip(ours, theirs, strict=True)):
        return None
    shown = [" to ".join("x".join(map(str, shape)) for shape in shapes) for shapes in (ours, theirs)]
    return (
        f"{option}: the student's {pair.student} maps {shown[0]}, the teacher's {pair.teacher} {shown[1]}; but for the "
        "channels these must agree, pair blocks of the same level"
    )
