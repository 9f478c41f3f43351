"""The order of a training set, a function of (seed, epoch)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized

import numpy as np
import torch
from torch.utils.data import Sampler


class PositionSampler(Sampler[tuple[int, int]]):
    """Yields ``(epoch, position)`` for a :class:`~kdsr.data.seeded_dataset.SeededDataset`.

    A position indexes the enlarged data set *before* the modulo: with ratio 100 every image has 100 positions per
    epoch, each with its own crop. The permutation of ``ceil(len(dataset) * ratio)`` positions does not depend on the
    number of ranks; rank r takes ``order[r::num_replicas]``, and the remainder is dropped. The k-th batches of all
    ranks together hold the images of the k-th batch of one process with the total batch size.

    Takes the arguments of BasicSR's ``EnlargedSampler``, whose order ignores the seed and depends on the number of
    ranks.

    Args:
        dataset: The training set.
        num_replicas: Number of processes.
        rank: This process.
        ratio: Enlargement of the data set per epoch.
        seed: Not negative; default: ``dataset.seed``.
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
        """Resumes within an epoch, skipping its first ``samples`` positions (of all ranks together).

        The rest is shared among the current ranks, whose number may have changed.
        """
        self.resume_epoch, self.resume_after = epoch, samples

    def left(self, epoch: int) -> int:
        """Positions per rank that remain in an epoch."""
        done = self.resume_after if epoch == self.resume_epoch else 0
        return max(self.total_size - done, 0) // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, and thereby the permutation; called by BasicSR's loop."""
        self.epoch = epoch
