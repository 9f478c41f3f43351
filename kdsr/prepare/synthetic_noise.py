"""Gaussian noise, as for the denoising benchmarks with sigma 15, 25 and 50."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdsr.prepare.synthesis import Degradation, Image, Parameters, Range, draw, setting


def add_gaussian_noise(image: Image, sigma: float, generator: np.random.Generator) -> Image:
    """Adds white Gaussian noise, independent in each channel, then rounds and clips to 8 bits.

    Clipping reduces the noise near black and white and shifts its mean (at sigma 50 even in mid-greys). Benchmarks that
    add noise to floating-point images without clipping differ.

    Args:
        image: (H, W) or (H, W, C), uint8.
        sigma: Standard deviation in units of [0, 255].
    """
    noise = generator.standard_normal(image.shape, dtype=np.float32) * np.float32(sigma)
    return np.rint(np.clip(image + noise, 0, 255)).astype(np.uint8)


@dataclass(frozen=True)
class Noise(Degradation):
    """Gaussian noise with a random standard deviation per image."""

    name: ClassVar[str] = "noise"
    sigma: Range = setting((25.0, 25.0), "Standard deviation, in units of 0 to 255.", (0, 255))

    def __call__(self, image: Image, generator: np.random.Generator, name: str) -> tuple[Image, Parameters]:
        sigma = draw(generator, self.sigma)
        return add_gaussian_noise(image, sigma, generator), {"sigma": sigma}
