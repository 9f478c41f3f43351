"""Motion blur with one kernel per image, from a synthetic camera shake or measured.

The path of a shake is a steady drift plus a velocity with inertia (an Ornstein-Uhlenbeck process) and sudden jerks.
The kernel is the time that the path spends over each pixel. Compare Boracchi and Foi, "Modeling the performance of
image restoration from motion blur" (IEEE TIP 2012), who use another random process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from kdsr.prepare.blur_kernels import NamedKernel
from kdsr.prepare.synthesis import (
    Degradation,
    Floats,
    Image,
    Parameters,
    Range,
    as_8bit,
    as_float,
    draw,
    setting,
)
from kdsr.runtime.errors import DataError, OptionError

_STEPS = 256  # points of the path
_PIECES = 16  # interpolated points per step
_MEMORY = 0.15  # time constant of the velocity, in exposure times
_JERKS = 4.0  # mean number of jerks per exposure at full shake
_TURNS = 8  # quarter turns and their mirror images


def camera_path(size: float, shake: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """The path of an image point on the sensor, at equal time intervals.

    Args:
        size: Largest distance between two points of the path, in pixels.
        shake: From 0, a straight line at constant speed, to 1, where random motion dominates.

    Returns:
        (256, 2), y and x, with mean 0.
    """
    step = 1 / _STEPS
    heading = generator.uniform(0, 2 * math.pi)
    drift = np.array([math.sin(heading), math.cos(heading)])
    pushes = generator.standard_normal((_STEPS, 2)) * math.sqrt(2 * step / _MEMORY)
    jerks = generator.standard_normal((_STEPS, 2)) * 2
    jerks[generator.random(_STEPS) >= _JERKS * shake * step] = 0
    velocity = np.zeros(2)
    path = np.zeros((_STEPS, 2))
    for number in range(1, _STEPS):
        velocity = velocity * (1 - step / _MEMORY) + shake * pushes[number] + jerks[number]
        path[number] = path[number - 1] + (drift + velocity) * step
    distances = np.linalg.norm(path[:, None] - path, axis=2)
    path *= size / max(float(distances.max()), 1e-9)
    return path - path.mean(axis=0)


def rasterise(path: NDArray[np.float64]) -> Floats:
    """The kernel of a path: each point is distributed bilinearly to its four nearest pixels.

    Args:
        path: (N, 2), y and x in pixels from the kernel's centre, at equal time intervals.

    Returns:
        (K, K), K odd, with sum 1. Its centre of mass is the mean of the path's points.
    """
    times = np.linspace(0, len(path) - 1, _PIECES * (len(path) - 1) + 1)
    points = np.stack([np.interp(times, np.arange(len(path)), part) for part in path.T], axis=1)
    points -= points.mean(axis=0) - path.mean(axis=0)
    radius = math.ceil(float(np.abs(points).max())) if len(points) else 0
    kernel = np.zeros((2 * radius + 3, 2 * radius + 3))
    whole = np.floor(points).astype(np.intp)
    rest = points - whole
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - rest[:, 0]) * np.abs(1 - right - rest[:, 1])
            np.add.at(kernel, (whole[:, 0] + down + radius + 1, whole[:, 1] + right + radius + 1), weight)
    return _trimmed(kernel / kernel.sum()).astype(np.float32)


def _trimmed(kernel: NDArray[Any]) -> NDArray[Any]:
    """Crops zero borders symmetrically."""
    middle = kernel.shape[0] // 2
    reach = int(max(np.abs(axis - middle).max() for axis in np.nonzero(kernel > 1e-9)))
    return kernel[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]


def to_linear(image: NDArray[Any]) -> Floats:
    """sRGB values in [0, 1] to linear light in [0, 1] (IEC 61966-2-1)."""
    return np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_srgb(light: NDArray[Any]) -> Floats:
    """The inverse of :func:`to_linear`."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055).astype(np.float32)


def blur(image: NDArray[Any], kernel: Floats) -> Floats:
    """Convolves: the blur of a single point is the kernel, not its mirror image.

    Args:
        image: (H, W) or (H, W, C), floating point; mirrored at the border.
        kernel: (K, K), K odd.

    Raises:
        DataError: The kernel is larger than the image.
    """
    if min(image.shape[:2]) < max(kernel.shape):
        raise DataError(
            f"{image.shape[1]}x{image.shape[0]} pixels are too few for a kernel of {kernel.shape[0]}; "
            "leave such images out (--min-size), or use smaller kernels"
        )
    # filter2D computes a correlation
    mirrored = np.ascontiguousarray(kernel[::-1, ::-1])
    image = np.asarray(image, np.float32)
    return np.asarray(
        cv2.filter2D(image, cv2.CV_32F, mirrored, borderType=cv2.BORDER_REFLECT_101), np.float32
    )


@dataclass(frozen=True, eq=False)
class Blur(Degradation):
    """Motion blur with a random kernel per image, of a synthetic camera shake or measured."""

    name: ClassVar[str] = "blur"
    size: Range = setting((5.0, 31.0), "Extent of a camera shake, in pixels.", (0, 1000))
    shake: Range = setting((0.0, 1.0), "0: a straight line; 1: random motion dominates.", (0, 1))
    kernels: tuple[NamedKernel, ...] | None = setting(  # from read_kernels
        None,
        "Measured kernels instead: a folder or file (image, .npy, .mat); may be repeated.",
        option=list[Path],
    )
    turn: bool = setting(False, "Randomly rotate and mirror measured kernels.")
    linear_light: bool = setting(False, "Blur linear light, not sRGB values.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turn and self.kernels is None:
            raise OptionError("turn: only for measured kernels")

    def __call__(self, image: Image, generator: np.random.Generator, name: str) -> tuple[Image, Parameters]:
        kernel, parameters = self._kernel(generator)
        sharp = as_float(image)
        if self.linear_light:
            return as_8bit(to_srgb(blur(to_linear(sharp), kernel))), parameters
        return as_8bit(blur(sharp, kernel)), parameters

    def _kernel(self, generator: np.random.Generator) -> tuple[Floats, Parameters]:
        if self.kernels is None:
            size, shake = draw(generator, self.size), draw(generator, self.shake)
            return rasterise(camera_path(size, shake, generator)), {"size": size, "shake": shake}
        name, kernel = self.kernels[int(generator.integers(len(self.kernels)))]
        parameters: Parameters = {"kernel": name}
        if self.turn:
            quarters, mirrored = divmod(int(generator.integers(_TURNS)), 2)
            parameters |= {"quarter_turns": quarters, "mirrored": bool(mirrored)}
            kernel = np.rot90(kernel[:, ::-1] if mirrored else kernel, quarters)
        return kernel, parameters
