"""Restores images of any size with an opened network, in tiles that fit into memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from kdsr.deploy.network_file import OpenedNetwork, require_device
from kdsr.deploy.pictures import Picture, Result, result_of
from kdsr.deploy.tile_size import (
    LARGEST_UNMEASURED,
    PROBE,
    SMALLEST,
    available,
    bytes_per_pixel,
    fitting_tile,
)
from kdsr.distill.padding import extended
from kdsr.models.image_metrics import is_finite
from kdsr.models.restorer import Restorer
from kdsr.runtime.errors import DataError, OptionError, is_out_of_memory
from kdsr.runtime.memory import free_memory, gib
from kdsr.runtime.precision import Precision, slow_problems


class Word(StrEnum):
    """Precisions."""

    float32 = "float32"
    bf16 = "bf16"
    fp16 = "fp16"
    auto = "auto"


def device_of(word: str | None) -> torch.device:
    """The device of that name; by default a GPU where there is one. Raises an ``OptionError`` if it is missing."""
    word = word or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(word)
    return torch.device(word)


@dataclass(frozen=True)
class Settings:
    """How images are restored.

    Attributes:
        device: Where the network is.
        precision: ``float32``, ``bf16``, ``fp16``, or ``auto``, bf16 where the device computes in it.
        tile: Side of the tiles in LQ pixels; 0: whole images; None: tiles where memory would not suffice.
        self_ensemble: Whether eight views are averaged.
    """

    device: torch.device = torch.device("cpu")
    precision: Word = Word.float32
    tile: int | None = None
    self_ensemble: bool = False


class Inference:
    """An opened network, ready for images of any size.

    Args:
        opened: The network.
        settings: See there.

    Raises:
        OptionError: The network takes or gives no pictures, or the precision is emulated or not available.
    """

    def __init__(self, opened: OpenedNetwork, settings: Settings) -> None:
        self.opened, self.settings = opened, settings
        if {opened.channels_in, opened.channels_out} - {1, 3} or opened.channels_in != opened.channels_out:
            raise OptionError(
                f"{opened.source}: maps {opened.channels_in} channels to {opened.channels_out}; "
                "only networks for colour images (3) or grey ones (1) restore image files"
            )
        word = None if settings.precision == "float32" else settings.precision
        self.is_torch = next(iter(opened.net.parameters()), None) is not None
        if word and not self.is_torch:
            raise OptionError(f"--precision {word}: an exported file computes in the precision of its export")
        if problems := slow_problems({"amp": word}, settings.device.type == "cpu"):
            raise OptionError([problem.replace("precision.amp:", "--precision") for problem in problems])
        if self.is_torch:
            Precision({"amp": word}, settings.device).fix(opened.net, "student", cast=True)
        self.fixed = self._fixed_tile()
        self.largest: int | None = None  # tile that was left after a lack of memory
        self._per_pixel: float | None = None

    def __call__(self, lq: Tensor) -> Tensor:
        """Restores (N, C, H, W) in [0, 1] to (N, C', H·scale, W·scale), whole or in tiles; smaller tiles where the
        memory does not suffice.

        Raises:
            DataError: Not even the smallest tile, or the result, fits into memory.
        """
        if self.opened.channels_in == 1 and lq.shape[1] > 1:  # a network for grey images restores each colour
            return self(lq.flatten(0, 1)[:, None]).unflatten(0, lq.shape[:2])[:, :, 0]
        height, width = lq.shape[-2:]
        self._require_room(lq)
        if self.fixed is not None:
            scale, whole = self.opened.scale, at_least(lq, self.fixed)
            return self._restored(whole, self.fixed)[..., : height * scale, : width * scale]
        tile = self._tile(lq)
        while True:
            try:
                return self._restored(lq, tile)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                side = min(tile or max(height, width), max(height, width))
                if self.settings.tile is not None or side <= SMALLEST:
                    raise DataError(
                        f"{width}x{height} pixels do not fit into memory; {self._cure()}"
                    ) from error
            # outside of the handler, which keeps the tensors of the failed pass
            self.largest = tile = max(SMALLEST, side // 2)
            if self.settings.device.type == "cuda":
                torch.cuda.empty_cache()

    def result(self, picture: Picture) -> Result:
        """Restores a picture.

        Raises:
            DataError: As for calling it; the output is not finite, or has not ``scale`` times the size.
        """
        output = self(picture.as_tensor(self.opened.channels_in))
        if not is_finite(output):
            raise DataError(
                "the network's output is not finite (NaN or infinite): damaged weights, or a --precision that overflows"
            )
        if [*output.shape[-2:]] != [side * self.opened.scale for side in picture.size]:
            raise DataError(f"the network's output is not {self.opened.scale} times the input")
        return result_of(picture, output, self.opened.scale)

    def _restored(self, lq: Tensor, tile: int | None) -> Tensor:
        with torch.no_grad():
            return self._restorer(tile)(self.opened.net, lq.to(self.settings.device)).float()

    def _fixed_tile(self) -> int | None:
        """Side of the only image that an exported file takes; None where sizes are free."""
        size = getattr(self.opened.net, "fixed_size", None)
        if size is None:
            return None
        if size[0] != size[1] or self.settings.tile not in (None, size[0]):
            raise OptionError(
                f"{self.opened.source}: takes images of {size[1]}x{size[0]} pixels only; "
                + ("omit --tile" if size[0] == size[1] else "export it for a square, or for free sizes")
            )
        return int(size[0])

    def _restorer(self, tile: int | None) -> Restorer:
        val = {
            "tile": tile or None,
            "self_ensemble": self.settings.self_ensemble,
            "multiple_of": 1 if self.fixed else self.opened.multiple_of,
        }
        return Restorer({"scale": self.opened.scale, "val": val})

    def _tile(self, lq: Tensor) -> int | None:
        """The tiles for an image: those asked for, else those that an estimate of the memory allows."""
        asked = self.settings.tile
        if asked is not None:
            return asked or None
        batch, channels, height, width = lq.shape
        if not self.is_torch:
            tile = LARGEST_UNMEASURED if max(height, width) > LARGEST_UNMEASURED else None
        elif height * width <= PROBE**2:
            tile = None
        else:
            if self._per_pixel is None:
                self._per_pixel = self._measure(channels)
            free = available(self.settings.device)
            tile = fitting_tile(height, width, batch * self._per_pixel, free)
        if self.largest is None or max(height, width) <= self.largest:
            return tile
        return min(tile or self.largest, self.largest)

    def _measure(self, channels: int) -> float:
        try:
            return bytes_per_pixel(self._restorer(None), self.opened.net, channels, self.settings.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return math.inf

    def _require_room(self, lq: Tensor) -> None:
        """The result is gathered in float32 and then rounded; a process that takes too much is killed."""
        batch, channels, height, width = lq.shape
        scale, free = self.opened.scale, free_memory()
        needed = batch * channels * height * width * scale**2 * 6
        if free is not None and needed > free:
            raise DataError(
                f"the result of {width}x{height} pixels ×{scale} needs {gib(needed)} of {gib(free)}; cut the image"
            )

    def _cure(self) -> str:
        return "use --tile, or a smaller one" if self.settings.tile is not None else "use another --device"


def at_least(lq: Tensor, side: int) -> Tensor:
    """Extends (N, C, H, W) by reflection at the bottom and the right to at least ``side`` pixels."""
    height, width = lq.shape[-2:]
    return extended(lq, side)[..., : max(height, side), : max(width, side)]
