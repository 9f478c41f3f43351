"""Haze by the atmospheric scattering model (Koschmieder; Narasimhan and Nayar, IJCV 2002).

``I = J t + A (1 - t)`` with the scene J, the airlight A and the transmission ``t = exp(-beta d)`` at distance d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from kdsr.data.image_files import EXTENSIONS, cannot_read, decode
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
from kdsr.runtime.errors import DataError

_OCTAVES = 3


def add_haze(image: NDArray[Any], depth: NDArray[Any], beta: float, airlight: Sequence[float]) -> Floats:
    """The scattering model.

    Args:
        image: J, (H, W) or (H, W, C) in [0, 1].
        depth: d, (H, W), >= 0.
        beta: Scattering coefficient per unit of depth, >= 0.
        airlight: A, one value in [0, 1] per channel.

    Returns:
        I, float32, of the image's shape.
    """
    t = per_channel(np.exp(-beta * depth), image)
    light = np.asarray(airlight, np.float32)
    return (image * t + (light if image.ndim == 3 else light[0]) * (1 - t)).astype(np.float32)


def smooth_depth(shape: tuple[int, ...], gradient: float, generator: np.random.Generator) -> Floats:
    """A smooth random depth that increases from the lower border to the upper one.

    Args:
        shape: Height and width.
        gradient: Weight of the vertical ramp, 0 to 1; the rest is low-frequency noise.

    Returns:
        (H, W), scaled to [0, 1].
    """
    height, width = shape
    field = np.zeros((height, width), np.float32)
    longest = max(height, width)
    for octave in range(_OCTAVES):
        # equal knot spacing in both directions; two more knots avoid border effects
        knots = 2 * 2**octave
        grid = [max(2, round(knots * side / longest)) + 2 for side in (height, width)]
        noise = generator.uniform(-1, 1, grid).astype(np.float32)
        field += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * 0.5**octave
    ramp = np.linspace(1, 0, height, dtype=np.float32)[:, None]
    depth = (1 - gradient) * _stretched(field) + gradient * ramp
    return _stretched(depth)


def _stretched(field: Floats) -> Floats:
    low, high = field.min(), field.max()
    return (field - low) / max(high - low, np.float32(1e-6))


def read_depth(path: Path) -> Floats:
    """Reads a depth map: a grey image of 8 or 16 bits, or an ``.npy`` file; brighter is farther.

    Returns:
        (H, W), divided by its maximum.

    Raises:
        DataError: It is unreadable, not (H, W), negative, not finite, or zero everywhere.
    """
    try:
        if path.suffix.lower() == ".npy":
            depth = np.load(path, allow_pickle=False)
        else:
            depth = decode(path.read_bytes(), cv2.IMREAD_UNCHANGED, str(path))
    except DataError:
        raise
    except OSError as error:
        raise cannot_read(str(path), error) from error
    except Exception as error:  # numpy's errors for damaged files have no common base
        raise DataError(f"{path} is not an array file: {error}") from error
    if depth.ndim == 3 and depth.shape[2] == 3 and (depth == depth[..., :1]).all():
        depth = depth[..., 0]  # grey, saved as colour
    if depth.ndim != 2 or depth.dtype.kind not in "uif":
        raise DataError(f"{path} has shape {depth.shape} of {depth.dtype}: a depth map is grey, (H, W)")
    depth = depth.astype(np.float32)
    if not np.isfinite(depth).all() or depth.min() < 0 or depth.max() <= 0:
        raise DataError(f"{path}: depth must be finite, not negative, and not zero everywhere")
    return depth / depth.max()


def find_depth_maps(folder: Path) -> dict[str, Path]:
    """The depth maps of a folder by name without extension.

    Raises:
        DataError: There is none, or two have the same name.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}")
    maps: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in EXTENSIONS | {".npy"} and not path.name.startswith("."):
            if path.stem in maps:
                raise DataError(
                    f"{maps[path.stem]} and {path} are both depth maps of {path.stem}; remove one"
                )
            maps[path.stem] = path
    if not maps:
        raise DataError(f"There is no depth map in {folder}: images or .npy files, named as the photographs")
    return maps


@dataclass(frozen=True)
class Haze(Degradation):
    """Haze with random airlight A, density and depth per image."""

    name: ClassVar[str] = "haze"
    airlight: Range = setting((0.7, 1.0), "Brightness of the haze, 0 to 1.", (0, 1))
    tint: float = setting(0.02, "Largest deviation of its channels.", (0, 1))
    # depth is in [0, 1], so the farthest transmission is exp(-beta)
    beta: Range = setting(
        (0.6, 1.8), "Scattering coefficient; the farthest point has depth 1.", (0, math.inf)
    )
    gradient: Range = setting((0.3, 0.8), "Share of a vertical ramp in a random depth, 0 to 1.", (0, 1))
    depth: dict[str, Path] | None = setting(  # by image name, from find_depth_maps
        None,
        "Folder of depth maps instead (grey or .npy, brighter is farther), named as the images.",
        option=Path,
    )

    def check_names(self, names: Iterable[str]) -> None:
        """Raises a ``DataError`` that lists images without a depth map."""
        missing = [name for name in names if self.depth is not None and name not in self.depth]
        if missing:
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise DataError(f"{len(missing)} images have no depth map of the same name: {shown}")

    def __call__(self, image: Image, generator: np.random.Generator, name: str) -> tuple[Image, Parameters]:
        grey, beta = draw(generator, self.airlight), draw(generator, self.beta)
        channels = image.shape[2] if image.ndim == 3 else 1
        tints = [draw(generator, (-self.tint, self.tint)) for _ in range(channels)]
        airlight = [round(min(max(grey + tint, 0.0), 1.0), 6) for tint in tints]
        parameters: Parameters = {"beta": beta, "airlight": airlight}
        if self.depth is None:
            parameters["gradient"] = draw(generator, self.gradient)
            depth = smooth_depth(image.shape[:2], parameters["gradient"], generator)
        else:
            self.check_names([name])
            parameters["depth"] = self.depth[name].name
            depth = read_depth(self.depth[name])
            if depth.shape != image.shape[:2]:
                (height, width), wanted = depth.shape, image.shape
                raise DataError(
                    f"its depth map {self.depth[name]} is {width}x{height}, the image {wanted[1]}x{wanted[0]}"
                )
        return as_8bit(add_haze(as_float(image), depth, beta, airlight)), parameters
