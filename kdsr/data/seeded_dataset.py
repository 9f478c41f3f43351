"""Wraps a BasicSR data set: seeded items, and errors that name the file."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from kdsr.data.image_files import UnreadableImage, cannot_read, decode_color, sizes_match
from kdsr.data.image_info import ImageInfo, probe, probe_on_disk
from kdsr.data.image_roots import open_root, spread
from kdsr.data.lmdb_client import LmdbClient
from kdsr.data.ram_cache import files_of
from kdsr.data.stored_outputs import KEY
from kdsr.data.teacher_images import TeacherImages
from kdsr.runtime.errors import DataError

REPLACED = "replaced"  # key of an item with on_bad_image: skip: the images that it replaces, one per line
MOST_IN_A_ROW = 10  # unreadable images that are skipped; a tenth of a large data set


@contextmanager
def _seeded(seed: int, epoch: int, position: int) -> Iterator[None]:
    """Seeds Python's and NumPy's global generators for one item, and restores them."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    words = np.random.SeedSequence(seed, spawn_key=(1, epoch, position)).generate_state(8)
    np.random.seed(words[:4])
    random.seed(int.from_bytes(words[4:].tobytes(), "little"))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class SeededDataset(Dataset):
    """Makes a data set's random numbers a function of (seed, epoch, position).

    - Item ``(epoch, position)`` of :class:`~kdsr.data.samplers.PositionSampler` is item ``position % len(dataset)``,
      loaded with Python's and NumPy's generators seeded by the three numbers. A plain index works too (validation).
    - Items are sorted by path, so that an index means the same image on every machine, on disk and in LMDB.
    - An unreadable image, or a GT image of the wrong size (which BasicSR crops in validation), raises a
      :class:`DataError` with the file's name.
    - With ``on_bad_image: skip`` a training item with an unreadable image is replaced by the item of the next readable
      position, with the random numbers of its own. Its key ``REPLACED`` names the images that it replaces.
    - Where the set has the option ``teacher_images``, a training item has the teacher's output for its patch (``KEY``).
    - Other attributes are those of the wrapped data set.

    Args:
        dataset: Any map-style data set of BasicSR.
        seed: Not negative.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self._order = _order_by_path(dataset)
        self._size_checked: set[int] = set()
        self.teacher_images = TeacherImages(dataset) if _opt(dataset, "teacher_images") else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # during unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, item: int | tuple[int, int] | tuple[int, int, int | None]) -> Any:
        """Loads an item; the third number of a tuple is the ``gt_size`` of the patch.

        Raises:
            DataError: The image cannot be read (``UnreadableImage``), GT and LQ do not match the scale, or GT is
                smaller than the patch; with ``on_bad_image: skip`` also if too many in a row are unreadable.
        """
        if not isinstance(item, tuple):
            return self._load(self._order[item])
        epoch, position, *patch = item
        if patch and patch[0] is not None:
            self.dataset.opt["gt_size"] = patch[0]
        if _opt(self.dataset, "phase") == "train" and _opt(self.dataset, "on_bad_image") == "skip":
            return self._load_or_replace(epoch, position)
        return self._load_at(epoch, position)

    def smallest(self) -> int:
        """The index of the image with the shortest side, then the fewest pixels, by headers; 0 if none is readable.

        A large data set is sampled at even spacing.
        """
        found = {}
        lmdbs: dict[str, Any] = {}
        for position in spread(list(range(len(self)))):
            files = _files(self.dataset, self._order[position])
            for role in ("lq", "gt"):
                if role in files and (info := _header(self.dataset, role, files[role][0], lmdbs)):
                    found[position] = (min(info.size), max(info.size))
                    break
        return min(found, key=lambda position: found[position], default=0)

    def keep(self, count: int) -> None:
        """Leaves out all but ``count`` images at even spacing."""
        total = len(self._order)
        self._order = (
            [self._order[number * total // count] for number in range(count)]
            if total > count
            else self._order
        )

    def stored_output(self, index: int) -> Tensor:
        """The teacher's output for an image, (3, H·scale, W·scale), where the set has them."""
        assert self.teacher_images is not None
        return self.teacher_images.whole(self._order[index])

    def decoded_bytes(self) -> int:
        """What ``cache: ram`` takes, by headers; estimated from an evenly spaced sample of a large data set."""
        lmdbs: dict[str, Any] = {}
        sample = spread(list(range(len(self))))
        headers = [
            _header(self.dataset, role, path, lmdbs)
            for index in sample
            for role, (path, _) in _files(self.dataset, index).items()
        ]
        channels = _opt(self.dataset, "in_ch") or 3
        taken = sum(info.height * info.width * (1 + (info.bits > 8)) for info in headers if info)
        return taken * channels * len(self) // max(len(sample), 1)

    def _load_at(self, epoch: int, position: int, ahead: int = 0) -> Any:
        """The item ``ahead`` positions later, with the random numbers of this position."""
        index = self._order[(position + ahead) % len(self._order)]
        with _seeded(self.seed, epoch, position):
            item = self._load(index)
        if self.teacher_images is not None:
            with _seeded(self.seed, epoch, position):
                item[KEY] = self.teacher_images.patch(index)
        return item

    def _load_or_replace(self, epoch: int, position: int) -> dict[str, Any]:
        bad: list[UnreadableImage] = []
        count = len(self._order)
        for ahead in range(min(count, max(MOST_IN_A_ROW, count // 10))):
            try:
                item = self._load_at(epoch, position, ahead)
            except UnreadableImage as error:
                bad.append(error)
            else:
                return item | {REPLACED: "\n".join(error.name for error in bad)}
        which = f"all {count}" if len(bad) == count else f"{len(bad)} in a row of {count}"
        raise DataError(f"{which} training images cannot be read; the first: {bad[0]}") from bad[0]

    def _load(self, index: int) -> Any:
        _share_lmdb(self.dataset)
        try:
            result = self.dataset[index]
        except DataError:
            raise
        except Exception as error:
            problem = _find_problem(self.dataset, index)
            if problem is None:  # a bug, not a problem of the data
                raise
            raise problem from error
        if index not in self._size_checked and _opt(self.dataset, "phase") != "train":
            problem = _size_problem(self.dataset, index)
            if problem is not None:
                raise problem
            self._size_checked.add(index)
        return result


def _share_lmdb(dataset: Any) -> None:
    """Gives a BasicSR data set an LMDB client that shares open LMDBs."""
    backend = getattr(dataset, "io_backend_opt", None)
    if getattr(dataset, "file_client", backend) is None and backend and backend.get("type") == "lmdb":
        dataset.file_client = LmdbClient(backend["db_paths"], backend["client_keys"])


def _opt(dataset: Any, key: str) -> Any:
    return getattr(dataset, "opt", {}).get(key)


def _order_by_path(dataset: Any) -> list[int]:
    """The indices sorted by path without extension (LMDB keys have none)."""
    order = list(range(len(dataset)))
    paths = getattr(dataset, "paths", None)
    if not isinstance(paths, list) or len(paths) != len(order):
        return order
    first = [min(map(str, path.values())) if isinstance(path, dict) else str(path) for path in paths]
    return sorted(order, key=lambda index: os.path.splitext(first[index])[0])


def _files(dataset: Any, index: int) -> dict[str, tuple[str, str]]:
    return files_of(dataset, index) if isinstance(getattr(dataset, "paths", None), list) else {}


def _header(dataset: Any, role: str, path: str, lmdbs: dict[str, Any]) -> ImageInfo | None:
    """An image's header or, for an LMDB, what meta_info.txt says of it; None if unknown."""
    try:
        if not str(_opt(dataset, f"dataroot_{role}")).endswith(".lmdb"):
            return probe_on_disk(path)
        if role not in lmdbs:
            lmdbs[role] = open_root(dataset.opt, f"dataroot_{role}", [])
        return lmdbs[role].info(path) if lmdbs[role] is not None else None
    except (KeyError, OSError, TypeError):
        return None


def _bytes(dataset: Any, path: str, role: str) -> bytes | None:
    content = dataset.file_client.get(path, role)
    return None if content is None else bytes(content)


def _find_problem(dataset: Any, index: int) -> DataError | None:
    """The likely cause of an item's error; None if its files are valid."""
    files = _files(dataset, index)
    if not files or getattr(dataset, "file_client", None) is None:
        return None
    sizes = {}
    for role, (path, name) in files.items():
        try:
            sizes[role] = decode_color(_bytes(dataset, path, role), name).shape[:2]
        except OSError as error:
            return cannot_read(name, error)
        except DataError as error:
            return error
    return _misfit(dataset, files, sizes)


def _size_problem(dataset: Any, index: int) -> DataError | None:
    """Compares the stored sizes of a GT/LQ pair, which the data set returns cropped."""
    files = _files(dataset, index)
    if not {"gt", "lq"} <= files.keys() or not _opt(dataset, "scale"):
        return None
    sizes = {}
    for role in ("gt", "lq"):
        try:
            sizes[role] = probe(_bytes(dataset, files[role][0], role) or b"").size
        except OSError:  # decodable by OpenCV, not by Pillow
            return None
    return _misfit(dataset, files, sizes)


def _misfit(
    dataset: Any, files: dict[str, tuple[str, str]], sizes: dict[str, tuple[int, int]]
) -> DataError | None:
    """The problem if the sizes do not match the scale, or GT is smaller than the patch."""
    if "gt" not in sizes:
        return None
    training, scale, patch = (
        _opt(dataset, "phase") == "train",
        _opt(dataset, "scale"),
        _opt(dataset, "gt_size"),
    )
    gt, name = sizes["gt"], files["gt"][1]
    lq = sizes.get("lq")
    if lq and scale and not sizes_match(gt, lq, scale, allow_remainder=not training):
        return DataError(
            f"GT and LQ do not match scale {scale}: {name} is {gt[0]}x{gt[1]} (height x width), "
            f"{files['lq'][1]} is {lq[0]}x{lq[1]}"
        )
    if training and patch and min(gt) < patch:
        return DataError(
            f"gt_size {patch} is larger than the image {name} ({gt[0]}x{gt[1]}): lower it or remove the image"
        )
    return None
