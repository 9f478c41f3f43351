"""Restores the images of a set, in batches of equal size, beside the threads that load them and use the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kdsr.models.image_metrics import as_image, is_finite, to_8_bits, without_normalisation
from kdsr.runtime.cpu_cores import own_cores
from kdsr.runtime.errors import DataError, is_out_of_memory

T = TypeVar("T")
R = TypeVar("R")
Restore = Callable[[Tensor], Tensor]

_THREADS = 4
_AHEAD = 4  # images that are loaded before, and used after, the one in the network
_HELD = 16  # loaded images that wait for others of their size, at most
_BATCH, _BATCH_PIXELS = 16, 256 * 256  # images, and LQ pixels, of a batch on a GPU


@dataclass(frozen=True)
class Loaded:
    """An image of a set.

    Attributes:
        index: Position in the data set.
        name: Path below the data root without the ending (``result_name``).
        data: The set's item, as a batch of one.
    """

    index: int
    name: str
    data: dict[str, Any]

    @property
    def path(self) -> str:
        return str(self.data["lq_path"][0])


@dataclass(frozen=True)
class Restored:
    """What a network has made of an image.

    Attributes:
        of: The image.
        output: (1, C, H, W), uint8, on the network's device.
        finite: Whether the network's values were finite; a scalar on the same device.
        gt: The ground truth, (H, W) or (H, W, C), uint8, BGR.
    """

    of: Loaded
    output: Tensor
    finite: Tensor
    gt: np.ndarray | None


def free_threads(device: torch.device) -> int:
    """Number of threads that can work beside the network's; with none free, they would only slow it down."""
    used = torch.get_num_threads() if device.type == "cpu" else 1
    return max(0, min(_THREADS, len(own_cores()) - used))


def ahead(pool: ThreadPoolExecutor | None, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yields ``function(item)`` in the order of the items, computed in ``pool`` a few items ahead.

    An error of ``items`` is raised after the results of the items before it. Without a pool it is ``map``.
    """
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    failure: Exception | None = None
    source = iter(items)
    while True:
        try:
            item = next(source)
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        waiting.append(pool.submit(function, item))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
    if failure is not None:
        raise failure


def largest_batch(height: int, width: int, device: torch.device, asked: int | None) -> int:
    """Number of images of height × width LQ pixels that are restored at once.

    By default one on a CPU, where more bring nothing, and on a GPU as many as have the pixels of one of 256×256.
    """
    if asked is not None or device.type == "cpu":
        return asked or 1
    return max(1, min(_BATCH, _BATCH_PIXELS // (height * width)))


def batches(images: Iterable[Loaded], device: torch.device, asked: int | None) -> Iterator[list[Loaded]]:
    """Groups images of one size; a group is yielded when it is full, or when too many images wait."""
    waiting: dict[torch.Size, list[Loaded]] = {}
    for image in images:
        shape = image.data["lq"].shape
        group = waiting.setdefault(shape, [])
        group.append(image)
        if len(group) >= largest_batch(shape[-2], shape[-1], device, asked):
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= _HELD:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def restored(
    restore: Restore, group: list[Loaded], network: str, device: torch.device, normalised: tuple[Any, ...]
) -> Iterator[Restored]:
    """Restores images of one size at once, or one by one if they do not fit into memory together.

    Args:
        restore: Maps an LQ batch, (N, C, H, W), to the restored batch.
        group: The images.
        network: Its name, for messages.
        device: Where ``restore`` runs; not waited for.
        normalised: Mean and standard deviation of the set, which are undone.
    """
    try:
        output = restore_batch(restore, [image.data for image in group], network, device)
    except DataError:
        if len(group) == 1:
            raise
        output = None
    if output is None:  # outside of the handler, which keeps the tensors of the failed pass
        for image in group:
            yield from restored(restore, [image], network, device, normalised)
        return
    for image, own in zip(group, output.split(1), strict=True):
        gt = image.data.get("gt")  # converted in this thread: in another one torch would start more of them
        yield Restored(
            image,
            to_8_bits(without_normalisation(own, *normalised)),
            is_finite(own),
            None if gt is None else as_image(without_normalisation(gt, *normalised)),
        )


def restore_batch(
    restore: Restore, items: list[dict[str, Any]], network: str, device: torch.device
) -> Tensor:
    """Restores items of a set that have one size; returns the output, (N, C, H, W).

    Other errors of the network get a note with the images' names.

    Raises:
        DataError: The images do not fit into memory.
    """
    paths = ", ".join(data["lq_path"][0] for data in items)
    height, width = items[0]["lq"].shape[-2:]
    try:
        with torch.no_grad():
            return restore(torch.cat([data["lq"] for data in items]).to(device))
    except Exception as error:
        if not is_out_of_memory(error):
            error.add_note(f"while {network} restored {paths} ({height}×{width} pixels)")
            raise
        raise DataError(
            f"{paths}: {width}x{height} pixels do not fit into memory; set val.tile to restore in tiles, "
            "or make the tiles smaller"
        ) from error
