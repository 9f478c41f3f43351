"""Losses of SLKD: natural-scene statistics for the encoder, edges and texture for the decoder.

"Knowledge Distillation for Image Restoration: Simultaneous Learning from Degraded and Clean Images" (arXiv
2501.09268, ICASSP 2025). The equations are our reading, see docs/methods.md; B is
``natural_scene_statistics``, P is ``edge_texture_statistics``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import cv2
import torch
import torch.nn.functional as F
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdsr.losses.brisque import natural_scene_statistics
from kdsr.losses.levels import check_levels
from kdsr.losses.mscn import contrast_constant, interleaved, widened
from kdsr.losses.piqe import BLOCK, SMALLEST_BLOCK, block_size, edge_texture_statistics
from kdsr.runtime.errors import OptionError

SLICE = 2**19  # values processed at once on a CPU, so that intermediate results stay in the cache

Statistics = Callable[[Tensor, Tensor], Tensor]  # maps (N, C, H, W) and the MSCN constant -> (N, C, ...)


def _slices(x: Tensor) -> list[tuple[slice, slice]]:
    """Slices of (N, C, H, W): some images, or some maps of one image. A single one on a GPU, to launch few kernels."""
    images, channels, height, width = x.shape
    if x.device.type != "cpu":
        return [(slice(None), slice(None))]
    maps = max(1, SLICE // (height * width))
    if maps >= channels:
        step = maps // channels
        return [(slice(first, first + step), slice(None)) for first in range(0, images, step)]
    return [
        (slice(image, image + 1), slice(first, first + maps))
        for image in range(images)
        for first in range(0, channels, maps)
    ]


def _transposed(x: Tensor) -> Tensor:
    """(N, A, B) -> (N, B, A), contiguous. OpenCV is several times faster than torch."""
    out = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
    for source, target in zip(x.numpy(), out.numpy(), strict=True):
        cv2.transpose(source, dst=target)
    return out


def _interleave(x: Tensor) -> Tensor:
    """A slice in at least float32, on a CPU in channels-last format, in which the extractors are fastest."""
    x = widened(x)
    if x.device.type != "cpu" or interleaved(x):
        return x
    if x.stride(1) == 1:
        return x.contiguous(memory_format=torch.channels_last)
    return _transposed(x.flatten(2).contiguous()).unflatten(1, x.shape[2:]).movedim(3, 1)


def _in_format_of(reference: Tensor, x: Tensor) -> Tensor:
    """A slice's gradient in the memory format of ``reference``."""
    if x.device.type != "cpu" or interleaved(reference):
        return x
    return _transposed(x.movedim(1, 3).flatten(1, 2).contiguous()).unflatten(2, x.shape[2:])


class _StatisticsDistance(torch.autograd.Function):
    """Mean absolute difference of the statistics of two maps, (N, C, H, W) each.

    Statistics are computed per map, so value and gradient are computed together, a few maps at a time, while the data
    are in the cache. The gradient is saved in float32: in half precision it would underflow before the loss scaling.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, c: Tensor, statistics: Statistics) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        total = c.new_zeros(())
        gradients: list[Tensor] = []
        for part in _slices(student):
            target = statistics(_interleave(teacher[part]), c)
            ours = _interleave(student[part].detach())
            share = ours.numel() / student.numel()
            with torch.set_grad_enabled(needs_grad):
                ours.requires_grad_(needs_grad)
                difference = (statistics(ours, c) - target).abs().mean() * share
            total += difference.detach()
            if needs_grad:
                gradients.append(_in_format_of(student, torch.autograd.grad(difference, ours)[0]))
        ctx.save_for_backward(*gradients)
        ctx.like = torch.empty_like(student, device="meta") if needs_grad else None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = torch.empty_like(ctx.like, device=grad.device)
        for part, gradient in zip(_slices(out), ctx.saved_tensors, strict=True):
            torch.mul(gradient, grad, out=out[part])
        return out, None, None, None


def statistics_distance(student: Tensor, teacher: Tensor, statistics: Statistics) -> Tensor:
    """Mean absolute difference of statistics(x, c), with c from the teacher's range.

    Args:
        student: Adapted features (N, C, H, W); only they receive a gradient.
        teacher: Features of the same shape.
        statistics: A function that is computed per map.

    Returns:
        A scalar >= 0, in at least float32.
    """
    teacher = teacher.detach()
    return _StatisticsDistance.apply(student, teacher, contrast_constant(teacher), statistics)


def natural_scene_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``L_NC``: the sum over levels of the mean absolute difference of B.

    Args:
        student: The student's encoder features, adapted: one (N, C, H, W) per level.
        teacher: Teacher A's features, same shapes, without gradient.

    Raises:
        ValueError: Numbers of levels or shapes differ.
    """
    check_levels("L_NC", student, teacher, channels=True)
    pairs = zip(student, teacher, strict=True)
    return torch.stack([statistics_distance(s, t, natural_scene_statistics) for s, t in pairs]).sum()


def edge_texture_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    strides: Sequence[int],
    *,
    full_block: int = BLOCK,
    softness: float = 0.02,
) -> Tensor:
    """``L_ET``: the sum over levels of the mean absolute difference of P.

    Args:
        student: The student's decoder features, as in ``natural_scene_distance``.
        teacher: Teacher B's features.
        strides: Stride of each level relative to the image: 1, 2, 4, ...
        full_block: Side of the blocks at stride 1; else ``max(4, full_block // stride)``.
        softness: Width of the soft thresholds.

    Raises:
        ValueError: Numbers of levels or shapes differ.
    """
    check_levels("L_ET", student, teacher, channels=True)
    if len(strides) != len(student):
        raise ValueError(f"L_ET: {len(student)} levels, but {len(strides)} strides")
    terms = []
    for s, t, stride in zip(student, teacher, strides, strict=True):
        block = block_size(stride, full_block)
        terms.append(
            statistics_distance(s, t, partial(edge_texture_statistics, block=block, softness=softness))
        )
    return torch.stack(terms).sum()


def spatial_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the softmax over all pixels of a channel, times the squared temperature.

    Args:
        student: (N, C, H, W); only it receives a gradient.
        teacher: The same shape.
        temperature: Divides both inputs of the softmax.

    Returns:
        A scalar >= 0 in nats, the mean over images and channels.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"spatial KL: shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ")
    log_s = F.log_softmax(widened(student).flatten(2) / temperature, 2)
    log_t = F.log_softmax(widened(teacher.detach()).flatten(2) / temperature, 2)
    return (log_t.exp() * (log_t - log_s)).sum(2).mean() * temperature**2


@LOSS_REGISTRY.register()
class NaturalSceneLoss(nn.Module):
    """``natural_scene_distance`` (L_NC) for option files.

    Args:
        loss_weight: Weight of the term (paper: 0.1).
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Features as in ``natural_scene_distance`` -> scalar."""
        return self.loss_weight * natural_scene_distance(student, teacher)


@LOSS_REGISTRY.register()
class EdgeTextureLoss(nn.Module):
    """``edge_texture_distance`` (L_ET) for option files.

    Args:
        loss_weight: Weight of the term (paper: 0.1).
        block_size: Side of PIQE's blocks at full resolution, even, at least 4.
        softness: Width of the soft thresholds, > 0.
    """

    def __init__(self, loss_weight: float = 1.0, block_size: int = BLOCK, softness: float = 0.02) -> None:
        super().__init__()
        if block_size < SMALLEST_BLOCK or block_size % 2:
            raise OptionError(
                f"EdgeTextureLoss: block_size {block_size} must be even and at least {SMALLEST_BLOCK}"
            )
        if softness <= 0:
            raise OptionError(f"EdgeTextureLoss: softness {softness} must be above 0")
        self.loss_weight = loss_weight
        self.block_size = block_size
        self.softness = softness

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
        """Features and strides as in ``edge_texture_distance`` -> scalar."""
        value = edge_texture_distance(
            student, teacher, strides, full_block=self.block_size, softness=self.softness
        )
        return self.loss_weight * value


@LOSS_REGISTRY.register()
class SpatialKLLoss(nn.Module):
    """``spatial_kl`` for option files.

    Args:
        loss_weight: Weight of the term.
        temperature: Temperature of both softmaxes, > 0.
    """

    def __init__(self, loss_weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise OptionError(f"SpatialKLLoss: temperature {temperature} must be above 0")
        self.loss_weight = loss_weight
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Images (N, C, H, W) -> scalar."""
        return self.loss_weight * spatial_kl(student, teacher, self.temperature)
