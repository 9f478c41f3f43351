"""Restores an image tile by tile: memory depends on the tile and not on the image.

Neighbouring tiles overlap, and the result is cut in the middle of the overlap: each pixel comes from the tile in which
it lies farther from the edge. With an overlap of 2r, a network whose outputs depend on at most r pixels to each side
gives the result of the whole image, to rounding. Blending the overlap would use the pixels next to the edges, and hide
seams rather than prevent them. Networks with global operations (channel attention, attention across the image)
compute their statistics per tile, so the result is only close to that of the whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kdsr.distill.padding import extended
from kdsr.models.sections import ValOptions
from kdsr.runtime.declarations import check_value
from kdsr.runtime.errors import OptionError

OVERLAP = 32  # LQ pixels; the default of val.tile_overlap for tiles of at least twice this size


def tile_of(val: Mapping[str, Any]) -> tuple[int, int] | None:
    """Side and overlap of the tiles that the options ``val`` ask for, in LQ pixels; None: the whole image at once.

    Raises:
        OptionError: There are no such tiles.
    """
    if problems := tile_problems(val):
        raise OptionError(problems)
    tile, overlap = val.get("tile"), val.get("tile_overlap")
    if tile is None:
        return None
    return int(tile), min(OVERLAP, int(tile) // 2) if overlap is None else int(overlap)


def tile_problems(val: Mapping[str, Any]) -> list[str]:
    """What is wrong with ``val.tile`` and ``val.tile_overlap``."""
    problems: list[str] = []
    for key in ("tile", "tile_overlap"):
        check_value(val.get(key), ValOptions.declared()[key], f"val.{key}", problems)
    tile, overlap = val.get("tile"), val.get("tile_overlap")
    if not problems and tile is not None and overlap is not None and overlap >= tile:
        problems.append(
            f"val.tile_overlap: {overlap} leaves nothing of tiles of {tile} (val.tile); it must be smaller"
        )
    return problems


@dataclass(frozen=True)
class Span:
    """A tile along one dimension, in LQ pixels of the image: the network sees [start, stop), [first, last) is kept."""

    start: int
    stop: int
    first: int
    last: int


def spans(size: int, tile: int, overlap: int, multiple_of: int = 1) -> list[Span]:
    """Tiles along a dimension: as few as there can be, of one length, neighbours overlapping by at least ``overlap``.

    They are spread evenly, so that the last one does not reach past the end and the overlaps share what is to spare.

    Args:
        size: Length of the dimension, a multiple of ``multiple_of``.
        tile: Longest tile; rounded up to a multiple, and to what overlaps and still moves on by one.
        overlap: Pixels that two neighbours must have in common.
        multiple_of: Tiles begin and end at its multiples only: a network that halves its features, or cuts them into
            windows, finds them on the grid of the whole image.

    Returns:
        The tiles in order; what is kept of them are the parts of [0, size).
    """
    tile = min(_round_up(max(tile, overlap + multiple_of if overlap else 1), multiple_of), size)
    step = max((tile - overlap) // multiple_of * multiple_of, multiple_of)
    steps = -(-(size - tile) // step)
    starts = [
        (size - tile) // multiple_of * number // max(steps, 1) * multiple_of for number in range(steps + 1)
    ]
    cuts = [0, *((start + tile + following) // 2 for start, following in pairwise(starts)), size]
    return [Span(start, start + tile, *cut) for start, cut in zip(starts, pairwise(cuts), strict=True)]


@torch.no_grad()
def tiled(
    net: Callable[[Tensor], Tensor], lq: Tensor, tile: int, overlap: int, scale: int, multiple_of: int = 1
) -> Tensor:
    """Restores images of any size in tiles of one size, without gradient.

    An image that is no larger than a tile is restored as by ``pad_and_restore``; a larger one is extended to the
    network's multiple once, as there, and then cut. The result is gathered on the CPU: of a 3840×2160 image ×4 it has
    1.6 GB, which a device that needs tiles would have to spare.

    Args:
        net: Maps (N, C, H, W) to (N, C', H·scale, W·scale).
        lq: (N, C, H, W), on the device of ``net``.
        tile: Longest side of what ``net`` is given, in LQ pixels; where it is no multiple of ``multiple_of`` or leaves
            no room for the overlap, the next one that is and does.
        overlap: LQ pixels that neighbouring tiles have in common, at least.
        scale: Upscaling factor of the network.
        multiple_of: What H and W must be divisible by for ``net``.

    Returns:
        (N, C', H·scale, W·scale), on the CPU.

    Raises:
        OptionError: A tile below one pixel, or an overlap that is negative or as long as the tile.
    """
    if problems := tile_problems({"tile": tile, "tile_overlap": overlap}):
        raise OptionError(problems)
    height, width = (size * scale for size in lq.shape[-2:])
    image = extended(lq, multiple_of)
    rows, columns = (spans(size, tile, overlap, multiple_of) for size in image.shape[-2:])
    whole: Tensor | None = None
    for row in rows:
        for column in columns:
            # contiguous: a network may ask for a view of its input
            piece = net(image[..., row.start : row.stop, column.start : column.stop].contiguous())
            if whole is None:
                whole = piece.new_empty((*piece.shape[:2], height, width), device="cpu")
            place = whole[
                ..., row.first * scale : row.last * scale, column.first * scale : column.last * scale
            ]
            top, left = (row.first - row.start) * scale, (column.first - column.start) * scale
            place.copy_(piece[..., top : top + place.shape[-2], left : left + place.shape[-1]])
    assert whole is not None  # an image has at least one tile
    return whole


def _round_up(size: int, multiple_of: int) -> int:
    return -(-size // multiple_of) * multiple_of
