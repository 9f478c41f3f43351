"""Common parts of the synthetic degradations (``synthetic_*.py``).

A degradation is a frozen dataclass of ranges. Called with an image and a generator, it draws its parameters and
returns the degraded image and the parameters. :class:`Seeded` derives the generator from a seed and the image's name,
so that a result does not depend on the number of processes, the order or other images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdsr.runtime.errors import DataError, OptionError

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]
Range = tuple[float, float]  # both ends included
Parameters = dict[str, Any]  # JSON values


def setting(default: Any, text: str, limits: Range | None = None, option: Any = None) -> Any:
    """A field of a degradation.

    Args:
        default: Its default: a range, a number, a switch or None.
        text: Help text of its command-line option.
        limits: Smallest and largest valid value.
        option: Type of the command-line option, if the default does not show it.
    """
    return field(default=default, metadata={"help": text, "limits": limits, "option": option})


@dataclass(frozen=True)
class Degradation:
    """Base of the degradations, frozen dataclasses whose fields are :func:`setting` s; ``name`` is the task.

    Raises:
        OptionError: A value is outside its limits.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, limits = getattr(self, entry.name), entry.metadata["limits"]
            if limits is not None:
                check_range(entry.name, value if isinstance(value, tuple) else (value, value), *limits)

    def __call__(self, image: Image, generator: np.random.Generator, name: str) -> tuple[Image, Parameters]:
        """Degrades an image, (H, W) or (H, W, C), uint8, to one of its shape; ``name`` selects its depth map."""
        raise NotImplementedError


def check_range(name: str, limits: Range, least: float, most: float) -> None:
    """Raises an ``OptionError`` for a range that is reversed, not finite, or not within ``[least, most]``."""
    low, high = limits
    shown = f"{name} {low:g}" if low == high else f"{name} {low:g},{high:g}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise OptionError(f"{shown}: give finite numbers")
    if low > high:
        raise OptionError(f"{shown}: the range is reversed; give {high:g},{low:g}")
    if low < least:
        raise OptionError(f"{shown}: must not be below {least:g}")
    if high > most:
        raise OptionError(f"{shown}: must not be above {most:g}")


def draw(generator: np.random.Generator, limits: Range) -> float:
    """A uniform draw, rounded to six decimals so that the recorded value is the one used."""
    return round(float(generator.uniform(*limits)), 6)


def as_float(image: Image) -> Floats:
    """uint8 to float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)


def as_8bit(image: NDArray[Any]) -> Image:
    """Floating-point values in [0, 1] to uint8, clipped and rounded."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def per_channel(values: NDArray[Any], image: NDArray[Any]) -> NDArray[Any]:
    """Adds a third dimension to an (H, W) field if the image has one."""
    return values[..., None] if image.ndim == 3 else values


def generator_for(seed: int, name: str) -> np.random.Generator:
    """A generator that depends only on the seed and the image's name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def plain(value: Any) -> Any:
    """Settings as JSON values: paths as strings, arrays by their shape."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.ndarray):
        return "x".join(map(str, value.shape))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    return value


@dataclass(frozen=True)
class Seeded:
    """A degradation whose result depends on the seed and the image's name only."""

    degradation: Degradation
    seed: int = 0

    def __call__(self, name: str, image: Image) -> tuple[Image, Parameters]:
        """Degrades the image with this name.

        Raises:
            DataError: The degradation does not fit the image; the message begins with the name.
        """
        try:
            degraded, parameters = self.degradation(image, generator_for(self.seed, name), name)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        return degraded, {"task": self.degradation.name, "seed": self.seed, **parameters}

    @property
    def settings(self) -> Parameters:
        """Everything that determines a result except the image and its name."""
        return {"task": self.degradation.name, "seed": self.seed, **plain(asdict(self.degradation))}
