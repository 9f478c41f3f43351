"""Cuts patches from the stored outputs of a teacher, where a training set cuts those of LQ and GT."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdsr.data.image_files import UnreadableImage, cannot_read, decode_color
from kdsr.data.image_info import probe, probe_on_disk
from kdsr.data.image_roots import quote, spread
from kdsr.data.lmdb_client import LmdbClient
from kdsr.data.stored_outputs import (
    ARRAY,
    PLAIN,
    LQFiles,
    View,
    digest,
    entries_of,
    entry_name,
    flips_of,
    views_of,
)
from kdsr.runtime.errors import DataError, OptionError


class TeacherImages:
    """The teacher's outputs for the images of a training set.

    A set in training draws a position and then flips, from seeded generators. ``patch`` draws the same numbers again.

    Args:
        dataset: One of ``TRAINING_SETS``. Its option ``teacher_images`` has ``root``, a folder or LMDB; ``place``, the
            option that names it; ``keyed``, whether ``kdsr data teacher-cache`` made it: its outputs are of flipped
            images, too, and have the hash of the LQ image in their names.

    Raises:
        OptionError: Outputs are missing, or belong to other images or another scale.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        source = dataset.opt["teacher_images"]
        self.root, self.place, self.keyed = source["root"], source["place"], source["keyed"]
        self.scale: int = dataset.opt.get("scale") or 1
        self.client = LmdbClient([self.root], ["t"]) if self.root.endswith(".lmdb") else None
        self.lq = LQFiles(dataset)
        self._read: dict[int, tuple[tuple[int, int], str]] = {}
        self._require_all()

    def patch(self, index: int) -> Tensor:
        """The part of an output that belongs to the patch which is drawn with the current state of ``random``.

        Returns:
            (3, gt_size, gt_size), RGB in the range of the set's ``gt``.

        Raises:
            DataError: It cannot be read, or has another size than its LQ image at the scale.
        """
        opt, (height, width) = self.dataset.opt, self._lq(index)[0]
        size = opt["gt_size"] // self.scale
        if min(height, width) < size:  # Dataset_PairedImage would mirror it
            raise DataError(
                f"gt_size {opt['gt_size']} is larger than the output of {self.lq.path(index)}; lower it"
            )
        top, left = random.randint(0, height - size), random.randint(0, width - size)
        hflip, rotated = flips_of(opt)
        view = View(*(on and random.random() < 0.5 for on in (hflip, rotated, rotated)))
        image = self._pixels(index, view if self.keyed else PLAIN)
        top, left, size = (self.scale * number for number in (top, left, size))
        patch = self._as_tensor(image[top : top + size, left : left + size])
        return view.of(patch).contiguous()

    def whole(self, index: int) -> Tensor:
        """The output for the unflipped image, (3, H·scale, W·scale); like ``patch``."""
        return self._as_tensor(self._pixels(index, PLAIN))

    def _lq(self, index: int) -> tuple[tuple[int, int], str]:
        """Size of an LQ image and hash of its file, which is read once."""
        if index not in self._read:
            content = self.lq.read(index)
            try:
                self._read[index] = probe(content).size, digest(content)
            except OSError as error:
                raise cannot_read(self.lq.path(index), error) from error
        return self._read[index]

    def _entry(self, index: int, view: View) -> str:
        """The file of an output, below the folder, or its key."""
        if self.keyed:
            return f"{entry_name(view, self.lq.name(index), self._lq(index)[1])}{self.ending}"
        return self.entries[self._own_name(index)]

    def _own_name(self, index: int) -> str:
        """The name of another program's output: that of the LQ image, or else of the GT image."""
        name = self.lq.name(index)
        if name not in self.entries and "dataroot_gt" in self.dataset.opt:
            return self.lq.name(index, "gt")
        return name

    def _pixels(self, index: int, view: View) -> NDArray[Any]:
        """(H, W, 3), RGB; an array in a file is read from the disk where it is used."""
        entry = self._entry(index, view)
        shown = f"{self.root}: {entry}" if self.client else os.path.join(self.root, entry)
        try:
            if self.client is None and entry.endswith(ARRAY):
                image = np.load(shown, mmap_mode="r")
            else:
                content = self.client.get(entry, "t") if self.client else Path(shown).read_bytes()
                if content is not None and content.startswith(np.lib.format.MAGIC_PREFIX):
                    image = np.load(io.BytesIO(content))
                else:
                    image = decode_color(content, shown)[..., ::-1]
        except (ValueError, EOFError) as error:  # NumPy's for a damaged array
            raise UnreadableImage(f"Cannot read {shown}: {error}", shown) from error
        except OSError as error:
            raise cannot_read(shown, error) from error
        if problem := self._size_problem(index, image.shape, shown):
            raise DataError(problem)
        return image

    def _as_tensor(self, image: NDArray[Any]) -> Tensor:
        """(H, W, 3) -> (3, H, W), float32, normalised like the images of the set."""
        if np.issubdtype(image.dtype, np.integer):  # an array of another program
            image = image / np.float32(np.iinfo(image.dtype).max)
        tensor = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32, order="C"))
        mean, std = (getattr(self.dataset, key, None) for key in ("mean", "std"))
        if mean is None and std is None:
            return tensor
        from torchvision.transforms.functional import normalize  # takes as long to import as torch

        return normalize(tensor, mean, std)

    # ------------------------------------------------------------------------------------------- checks

    def _require_all(self) -> None:
        """Names missing outputs; of some images (``spread``) also those that do not belong to them."""
        if self.keyed and not os.path.isdir(self.root):
            raise OptionError(
                f"{self.place}: there is no {self.root}, the outputs of this teacher with these weights, at scale "
                f"{self.scale}; run kdsr data teacher-cache -opt FILE"
            )
        self.entries = entries_of(self.root)
        indices = range(len(self.dataset.paths))
        if self.keyed:
            missing = self._missing_views()
        else:
            missing = [self.lq.name(i) for i in indices if self._own_name(i) not in self.entries]
        if missing:
            remedy = (
                "run kdsr data teacher-cache again" if self.keyed else "give them the names of the LQ images"
            )
            raise OptionError(
                f"{self.place}: {self.root} has no {quote(missing)}, which datasets.train needs; {remedy}"
            )
        problems: list[str] = []
        for index in spread(list(indices)):  # the others when they are read
            try:
                problem = self._wrong_image(index) if self.keyed else self._wrong_size(index)
            except (UnreadableImage, OSError, ValueError):
                continue  # on_bad_image says what to do with it
            problems += [problem] if problem else []
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise OptionError(f"{problems[0]}{more}")
        if self.keyed:  # their names are known
            self.entries = {}

    def _missing_views(self) -> list[str]:
        self.ending = os.path.splitext(next(iter(self.entries.values()), ""))[1] if not self.client else ""
        there = {entry.rpartition(".")[0] for entry in self.entries}
        views = views_of(self.dataset.opt)
        flipped = [v.name for v in views if not any(name.startswith(f"{v.name}/") for name in there)]
        if flipped and there and PLAIN.name not in flipped:
            raise OptionError(
                f"{self.place}: {self.root} has no outputs of flipped images ({', '.join(flipped)}), which "
                "datasets.train.use_hflip and use_rot need; run kdsr data teacher-cache again, or set both to false"
            )
        names = [self.lq.name(index) for index in range(len(self.dataset.paths))]
        return sorted({f"{view.name}/{name}" for view in views for name in names} - there)

    def _wrong_image(self, index: int) -> str | None:
        if entry_name(PLAIN, self.lq.name(index), self._lq(index)[1]) in self.entries:
            return None
        return (
            f"{self.place}: {self.lq.path(index)} has changed since {self.root} was made; "
            "run kdsr data teacher-cache again"
        )

    def _wrong_size(self, index: int) -> str | None:
        if self.client is not None:
            return None
        file = os.path.join(self.root, self._entry(index, PLAIN))
        shape = np.load(file, mmap_mode="r").shape if file.endswith(ARRAY) else (*probe_on_disk(file).size, 3)
        return self._size_problem(index, shape, file)

    def _size_problem(self, index: int, shape: tuple[int, ...], shown: str) -> str | None:
        height, width = self._lq(index)[0]
        if shape == (self.scale * height, self.scale * width, 3):
            return None
        return (
            f"{self.place}: {shown} is {'×'.join(map(str, shape))}, expected {self.scale * height}×"
            f"{self.scale * width}×3: {self.lq.path(index)} is {height}×{width}, the scale {self.scale}"
        )
