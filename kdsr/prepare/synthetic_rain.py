"""Rain streaks in several layers at different distances.

A layer is a field of sparse drops of random brightness, convolved with a streak, so that its streaks have nearly the
same direction and length. Farther layers are smaller and fainter. Layers, and a uniform veil of mist, are
screen-blended, ``1 - (1 - x) (1 - s)``: rain only adds light.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from kdsr.prepare.synthesis import (
    Degradation,
    Floats,
    Image,
    Parameters,
    Range,
    as_8bit,
    as_float,
    draw,
    per_channel,
    setting,
)

# The streaks of a layer are split into groups of slightly different angle, length and width.
_GROUPS = 3
_ANGLE_JITTER = 2.0  # degrees
_SIZE_JITTER = 0.3  # relative
_FARTHER = 0.7  # size and brightness of a layer, relative to the one in front of it


def streak_kernel(angle: float, length: float, width: float) -> Floats:
    """The shape of a streak: a line with a Gaussian profile that fades at its ends.

    Args:
        angle: Degrees from the vertical; positive: the lower end is to the right.
        length: Full width at half maximum along the streak, in pixels.
        width: Full width at half maximum across, in pixels.

    Returns:
        (K, K) with K odd; 1 at the centre.
    """
    radius = math.ceil(0.75 * length + 1.5 * width) + 1
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32)
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    along, across = x * sine + y * cosine, x * cosine - y * sine
    profile = np.exp(-4 * math.log(2) * (across / width) ** 2)
    # 1 in the inner half, then half a period of a cosine: 0.5 at length / 2
    ends = np.clip((np.abs(along) - 0.25 * length) / (0.5 * length), 0, 1)
    return (profile * (0.5 + 0.5 * np.cos(np.pi * ends))).astype(np.float32)


def streak_field(
    shape: tuple[int, ...], kernel: Floats, density: float, generator: np.random.Generator
) -> tuple[Floats, int]:
    """Streaks of one shape at random positions, with random brightness.

    Args:
        shape: Height and width.
        kernel: The shape, (K, K).
        density: Mean number of streaks per pixel: total area of the streaks divided by the image's.

    Returns:
        (H, W) >= 0, where a single streak of mean brightness has 1 at its centre; and the number of streaks in and
        around the image.
    """
    margin = kernel.shape[0] // 2  # for streaks that cross the border
    height, width = shape
    rows, columns = height + 2 * margin, width + 2 * margin
    number = int(generator.poisson(density * rows * columns / max(float(kernel.sum()), 1.0)))
    drops = np.zeros((rows, columns), np.float32)
    places = generator.integers(0, rows, number), generator.integers(0, columns, number)
    np.add.at(drops, places, generator.gamma(4, 0.25, number).astype(np.float32))
    filtered = cv2.filter2D(drops, cv2.CV_32F, kernel, borderType=cv2.BORDER_CONSTANT)
    field = np.asarray(filtered, np.float32)
    # filter2D uses an FFT, which leaves tiny values where there is no rain
    field[field < 1e-4] = 0
    return field[margin : margin + height, margin : margin + width], number


def screen(image: NDArray[Any], light: NDArray[Any] | float) -> Floats:
    """Screen blending: ``1 - (1 - image) (1 - light)``.

    Args:
        image: (H, W) or (H, W, C) in [0, 1].
        light: (H, W) in [0, 1], or one value.
    """
    if isinstance(light, np.ndarray):
        light = per_channel(light, image)
    return (1 - (1 - image) * (1 - light)).astype(np.float32)


@dataclass(frozen=True)
class Rain(Degradation):
    """Rain with random direction, strength and shape per image."""

    name: ClassVar[str] = "rain"
    angle: Range = setting(
        (-40.0, 40.0), "Degrees from the vertical; positive falls to the right.", (-90, 90)
    )
    length: Range = setting((14.0, 36.0), "Length of the nearest streaks, in pixels.", (1, 500))
    width: Range = setting((1.0, 2.0), "Width of the nearest streaks, in pixels.", (0.5, 100))
    density: Range = setting((0.15, 1.0), "Mean number of streaks over a pixel.", (0, 100))
    strength: Range = setting((0.1, 0.27), "Mean brightness of the nearest streaks, 0 to 1.", (0, 1))
    veil: Range = setting((0.0, 0.05), "Brightness of the mist, 0 to 1.", (0, 1))
    layers: int = setting(3, "Number of distances, 1 to 10.", (1, 10))

    def __call__(self, image: Image, generator: np.random.Generator, name: str) -> tuple[Image, Parameters]:
        fields = ("angle", "length", "width", "density", "strength", "veil")
        parameters: Parameters = {field: draw(generator, getattr(self, field)) for field in fields}
        streaks, parameters["layers"] = self._streaks(image.shape[:2], parameters, generator)
        return as_8bit(screen(screen(as_float(image), parameters["veil"]), streaks)), parameters

    def _streaks(
        self, shape: tuple[int, ...], drawn: Parameters, generator: np.random.Generator
    ) -> tuple[Floats, list[Parameters]]:
        """All layers blended, (H, W) in [0, 1], and the parameters of each group."""
        light = np.zeros(shape, np.float32)
        groups: list[Parameters] = []
        for layer in range(self.layers):
            size = _FARTHER**layer
            layer_light = np.zeros_like(light)
            for _ in range(_GROUPS):
                stretch = 1 + draw(generator, (-_SIZE_JITTER, _SIZE_JITTER))
                group: Parameters = {
                    "layer": layer,
                    "angle": round(drawn["angle"] + draw(generator, (-_ANGLE_JITTER, _ANGLE_JITTER)), 6),
                    "length": round(max(drawn["length"] * size * stretch, 1.0), 6),
                    "width": round(max(drawn["width"] * size, 0.8), 6),
                    "strength": round(drawn["strength"] * size, 6),
                }
                kernel = streak_kernel(group["angle"], group["length"], group["width"])
                share = drawn["density"] / (self.layers * _GROUPS)
                field, group["streaks"] = streak_field(shape, kernel, share, generator)
                layer_light += field * np.float32(group["strength"])
                groups.append(group)
            light = screen(light, np.clip(layer_light, 0, 1))
        return light, groups
