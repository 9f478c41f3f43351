"""The order of a training set: a function of (seed, epoch) alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized

import numpy as np
import torch
from torch.utils.data import Sampler


class PositionSampler(Sampler[tuple[int, int]]):
    """Yields ``(epoch, position)`` for a :class:`~kdsr.data.seeded_dataset.SeededDataset`.

    A position is an index *before* the modulo of the enlarged data set: with ratio 100 every image occurs at
    100 positions of an epoch, each with its own crop. The permutation has ``ceil(len(dataset) * ratio)``
    entries whatever the number of ranks, and rank r takes every ``num_replicas``-th one from the r-th on.
    What is left over is dropped, so every rank has the same number of positions, and the k-th batch of all
    ranks together holds the same images as the k-th batch of one process with the whole batch size.

    It takes the arguments of BasicSR's ``EnlargedSampler``, whose order ignores the seed and changes with the
    number of ranks.

    Args:
        dataset: The training set; its ``seed`` is used where none is given.
        num_replicas: Number of processes.
        rank: This process.
        ratio: How often the set occurs in one epoch.
        seed: Not negative.
    """

    def __init__(
        self, dataset: Sized, num_replicas: int, rank: int, ratio: float = 1, seed: int | None = None
    ) -> None:
        self.dataset = dataset
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = getattr(dataset, "seed", 0) if seed is None else seed
        self.epoch = 0
        self.total_size = math.ceil(len(dataset) * ratio)
        self.num_samples = self.total_size // num_replicas
        self.resume_epoch, self.resume_after = 0, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        entropy = np.random.SeedSequence(self.seed, spawn_key=(0, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0] >> 1))  # a seed is a signed 64-bit number
        order = torch.randperm(self.total_size, generator=generator)
        epoch = self.epoch
        done = self.resume_after if epoch == self.resume_epoch else 0
        left = order[done:]
        share = left[self.rank :: self.num_replicas][: len(left) // self.num_replicas]
        for position in share.tolist():
            yield epoch, position

    def __len__(self) -> int:
        return self.num_samples

    def resume(self, epoch: int, samples: int) -> None:
        """Goes on in the middle of an epoch: leaves out its first ``samples`` positions, those of all ranks together.

        So the number of ranks may have changed since: what is left is shared among those there are now.
        """
        self.resume_epoch, self.resume_after = epoch, samples

    def left(self, epoch: int) -> int:
        """Positions that each rank gets in an epoch."""
        done = self.resume_after if epoch == self.resume_epoch else 0
        return max(self.total_size - done, 0) // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next iteration over the sampler."""
        self.epoch = epoch
