"""Random degradations of the low-quality input, for the negatives of DCKD.

``I_neg^j = F_his(D_j(x))`` (arXiv 2412.08939): D_j blurs, resizes, adds noise and resizes back, in this
order, each with its own probability. Ranges are those of the authors' release. Kernel, scale and mode are drawn once
per negative, for the whole batch; the noise is drawn per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_SIZES = (3, 5, 7, 9, 11)
BLUR_SIGMA = (0.1, 2.0)  # pixels
NOISE_SIGMA = (1 / 255, 30 / 255)
ENLARGE_PROB = 0.25  # else it is reduced
ENLARGE_SCALE = (1.0, 1.5)
REDUCE_SCALE = (0.5, 1.0)
RESIZE_MODES = ("area", "bilinear", "bicubic")

_DRAWS = 12


def _between(limits: tuple[float, float], uniform: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * uniform


@dataclass(frozen=True)
class DegradationPlan:
    """The degradation of one negative, drawn on the CPU.

    Attributes:
        blur: Kernel sizes and sigmas (pixels), vertical then horizontal; None without blur.
        resize: Scale, interpolation mode, and mode of the resize back; None without resizing.
        noise_seed: Seed of the noise; None without noise.
        gray_noise_prob: Probability, per sample, that its noise is the same in all channels.
    """

    blur: tuple[tuple[int, float], tuple[int, float]] | None = None
    resize: tuple[float, str, str] | None = None
    noise_seed: int | None = None
    gray_noise_prob: float = 0.0

    @classmethod
    def draw(
        cls,
        generator: torch.Generator,
        *,
        blur_prob: float,
        resize_prob: float,
        noise_prob: float,
        gray_noise_prob: float,
    ) -> DegradationPlan:
        """Draws a plan from a CPU generator.

        The number of draws is constant, so that changing one probability does not change the other decisions of a run.
        The noise comes from a generator of the images' device, seeded here, so that a resume needs only the state of
        the CPU generator.
        """
        u = torch.rand(_DRAWS, generator=generator, dtype=torch.float64).tolist()
        kernels = [KERNEL_SIZES[int(len(KERNEL_SIZES) * value)] for value in u[1:3]]
        sigmas = [_between(BLUR_SIGMA, value) for value in u[3:5]]
        scale = _between(ENLARGE_SCALE if u[6] < ENLARGE_PROB else REDUCE_SCALE, u[7])
        mode, mode_back = (RESIZE_MODES[int(len(RESIZE_MODES) * value)] for value in (u[8], u[11]))
        return cls(
            blur=((kernels[0], sigmas[0]), (kernels[1], sigmas[1])) if u[0] < blur_prob else None,
            resize=(scale, mode, mode_back) if u[5] < resize_prob else None,
            noise_seed=int(u[10] * 2**53) if u[9] < noise_prob else None,
            gray_noise_prob=gray_noise_prob,
        )

    @property
    def changes_nothing(self) -> bool:
        return self.blur is None and self.resize is None and self.noise_seed is None


def gaussian_blur(x: Tensor, vertical: tuple[int, float], horizontal: tuple[int, float]) -> Tensor:
    """Blurs (N, C, H, W) by a Gaussian along each axis; (kernel size, sigma) in pixels. Mirrored at the
    border."""
    channels = x.shape[1]
    pads = [horizontal[0] // 2, vertical[0] // 2]
    mirrored = pads[0] < x.shape[3] and pads[1] < x.shape[2]
    x = F.pad(x, (pads[0], pads[0], pads[1], pads[1]), mode="reflect" if mirrored else "replicate")
    for (size, sigma), shape in ((vertical, (1, 1, -1, 1)), (horizontal, (1, 1, 1, -1))):
        # created on the device: copying a kernel from the CPU would synchronise
        offsets = torch.arange(size, device=x.device, dtype=x.dtype) - size // 2
        kernel = (-0.5 * (offsets / sigma).square()).softmax(0)
        x = F.conv2d(x, kernel.view(shape).expand(channels, *[-1] * 3), groups=channels)
    return x


def resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resizes (N, C, H, W) to a size (H, W) by one of ``RESIZE_MODES``, without antialiasing but for
    ``area``."""
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode=mode, align_corners=None if mode == "area" else False)


def gaussian_noise(x: Tensor, gray_prob: float, generator: torch.Generator) -> Tensor:
    """Adds Gaussian noise to (N, C, H, W) in [0, 1] and clips.

    Sigma is uniform in ``NOISE_SIGMA`` per sample. With probability ``gray_prob`` per sample the noise is
    grey: one field for all channels and, as in the release, the same field for all grey samples of the batch.
    """
    samples, height, width = x.shape[0], x.shape[2], x.shape[3]
    like: dict[str, Any] = {"device": x.device, "dtype": x.dtype, "generator": generator}
    low, high = NOISE_SIGMA
    sigma = low + (high - low) * torch.rand(samples, 1, 1, 1, **like)
    gray = torch.rand(samples, 1, 1, 1, **like) < gray_prob
    field = torch.randn(x.shape, **like)
    gray_field = torch.randn(height, width, **like)
    return (x + sigma * torch.where(gray, gray_field, field)).clamp(0, 1)


def apply_plan(x: Tensor, plan: DegradationPlan) -> Tensor:
    """One negative's degradation of a batch (N, C, H, W) in [0, 1]; x itself when the plan changes
    nothing."""
    if plan.changes_nothing:
        return x
    size = (x.shape[2], x.shape[3])
    if plan.blur is not None:
        x = gaussian_blur(x, *plan.blur)
    if plan.resize is not None:
        scale, mode, _ = plan.resize
        x = resize(x, (max(1, int(size[0] * scale)), max(1, int(size[1] * scale))), mode)
    if plan.noise_seed is not None:
        field_generator = torch.Generator(x.device).manual_seed(plan.noise_seed)
        x = gaussian_noise(x, plan.gray_noise_prob, field_generator)
    if plan.resize is not None:
        x = resize(x, size, plan.resize[2])  # not clipped after it, as in the release: bicubic overshoots
    return x


@torch.no_grad()
def degrade(
    x: Tensor,
    *,
    num: int,
    blur_prob: float,
    resize_prob: float,
    noise_prob: float,
    gray_noise_prob: float,
    generator: torch.Generator,
) -> Tensor:
    """``num`` random degradations of a batch, each by its own plan.

    Args:
        x: (N, C, H, W) in [0, 1], on any device.
        num: Number of degraded copies, at least 1.
        blur_prob: Probability of a blur, per copy.
        resize_prob: Probability of resizing down (or up) and back, per copy.
        noise_prob: Probability of noise, per copy.
        gray_noise_prob: Probability that a sample's noise is grey, where there is noise.
        generator: A CPU generator; ``num`` plans are drawn from it.

    Returns:
        (num * N, C, H, W), the N images of copy 0 first; in [0, 1] unless a bicubic resize overshoots. If all
        probabilities are 0, the copies equal x exactly.
    """
    plans = [
        DegradationPlan.draw(
            generator,
            blur_prob=blur_prob,
            resize_prob=resize_prob,
            noise_prob=noise_prob,
            gray_noise_prob=gray_noise_prob,
        )
        for _ in range(num)
    ]
    with torch.autocast(x.device.type, enabled=False):  # a blur in bf16 would round to 1/256
        return torch.cat([apply_plan(x, plan) for plan in plans])
