"""``cache: ram``: decoded training images in memory that all loader processes share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdsr.data.image_files import Pixels, UnreadableImage, cannot_read, decode_pixels
from kdsr.runtime.errors import DataError
from kdsr.runtime.memory import free_shared_memory, gib

_BLOCK = 2**28  # bytes in one piece of shared memory, each of which is an open file
_Key = tuple[str, str]


class RamCache:
    """Images by role and path. Pickled for a spawned process, it is shared, not copied."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._places: dict[_Key, tuple[int, int, tuple[int, ...], str, int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self._blocks))

    def add(self, images: dict[_Key, Pixels]) -> None:
        """Adds images in one block.

        Raises:
            DataError: There is less shared memory.
        """
        needed, free = sum(image.values.nbytes for image in images.values()), free_shared_memory()
        if free is not None and needed > free:
            raise DataError(
                f"datasets.train.cache: {gib(self.nbytes)} of images are decoded and more are to come, but only "
                f"{gib(free)} of shared memory are free; remove cache: ram"
            )
        start = 0
        for key, (values, white) in images.items():
            self._places[key] = (len(self._blocks), start, values.shape, values.dtype.str, white)
            start += values.nbytes
        block = np.concatenate([image.values.reshape(-1).view(np.uint8) for image in images.values()])
        self._blocks.append(torch.from_numpy(block).share_memory_())

    def get(self, role: str, path: str) -> Pixels | None:
        """An image, which cannot be written to."""
        if (place := self._places.get((role, path))) is None:
            return None
        block, start, shape, dtype, white = place
        values: Any = np.ndarray(shape, dtype, self._blocks[block].numpy(), start)
        values.flags.writeable = False
        return Pixels(values, white)


def files_of(dataset: Any, index: int) -> dict[str, tuple[str, str]]:
    """An item's files: role (``lq``, ``gt``) -> (path or LMDB key, name for messages)."""
    entry, opt = dataset.paths[index], getattr(dataset, "opt", {})
    if not isinstance(entry, dict):
        role = getattr(dataset, "role", "lq" if opt.get("dataroot_lq") else "gt")
        entry = {f"{role}_path": entry}
    found = {}
    for key, path in entry.items():
        role = key.removesuffix("_path")
        root = str(opt.get(f"dataroot_{role}"))
        found[role] = (path, f"{root}: {path}" if root.endswith(".lmdb") else path)
    return found


class CachedImages:
    """Mixin of data sets of files: decoded images, from memory where ``fill_cache`` has put them.

    Attributes:
        whole_numbers: Whether training items may be whole numbers, for ``kdsr.data.patches.to_device``.
    """

    opt: Any
    paths: list[Any]
    file_client: Any
    whole_numbers: bool = False
    cache: RamCache | None = None

    def decoded(self, content: bytes | None, name: str) -> Pixels:
        return decode_pixels(content, name)

    def pixels(self, role: str, path: str, name: str) -> Pixels:
        """A decoded image; ``name`` is for messages.

        Raises:
            DataError: It cannot be read.
        """
        if self.cache is not None and (found := self.cache.get(role, path)) is not None:
            return found
        try:
            content = self.file_client.get(path, role)
        except OSError as error:
            raise cannot_read(name, error) from error
        return self.decoded(content, name)

    def fill_cache(self) -> RamCache:
        """Decodes all images in threads; unreadable ones are left out with ``on_bad_image: skip``.

        Raises:
            DataError: An image cannot be read, or there is too little memory.
        """
        cache = RamCache()
        names = {
            (role, path): name
            for index in range(len(self.paths))
            for role, (path, name) in files_of(self, index).items()
        }

        def load(key: _Key) -> Pixels | None:
            try:
                return self.pixels(*key, names[key])
            except UnreadableImage:
                if self.opt.get("on_bad_image") != "skip":
                    raise
                return None

        with ThreadPoolExecutor() as pool:
            waiting: dict[_Key, Pixels] = {}
            size = 0
            for key, image in zip(names, pool.map(load, names), strict=True):
                if image is not None:
                    waiting[key] = image
                    size += image.values.nbytes
                if size >= _BLOCK:
                    cache.add(waiting)
                    waiting, size = {}, 0
            if waiting:
                cache.add(waiting)
        self.cache = cache
        return cache
