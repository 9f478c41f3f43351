"""PositionSampler: the order of a training set."""

from __future__ import annotations

import math

import pytest

from kdsr.data.samplers import PositionSampler
from kdsr.data.seeded_dataset import SeededDataset


def positions(
    size: int, *, ratio: float = 1, world: int = 1, seed: int = 3, epoch: int = 0
) -> list[list[int]]:
    ranks = []
    for rank in range(world):
        sampler = PositionSampler(range(size), world, rank, ratio, seed)
        sampler.set_epoch(epoch)
        items = list(sampler)
        assert len(items) == len(sampler)
        assert {item[0] for item in items} == ({epoch} if items else set())
        ranks.append([item[1] for item in items])
    return ranks


def test_every_position_occurs_once() -> None:
    (order,) = positions(7, ratio=3)
    assert sorted(order) == list(range(21))
    assert order != sorted(order)


def test_fractional_ratio_rounds_up() -> None:
    (order,) = positions(5, ratio=0.5)
    assert sorted(order) == [0, 1, 2]


def test_order_depends_on_seed_and_epoch_only() -> None:
    assert positions(40, seed=1, epoch=2) == positions(40, seed=1, epoch=2)
    orders = [positions(40, seed=seed, epoch=epoch)[0] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("world", [2, 3, 5])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    size, per_rank = 31, 2
    (single,) = positions(size, world=1)
    ranks = positions(size, world=world)
    assert len({len(order) for order in ranks}) == 1  # every rank makes the same number of steps
    steps = len(ranks[0]) // per_rank
    assert steps == size // (per_rank * world)  # as many as one process with the whole batch and drop_last
    for step in range(steps):
        batch = {p for order in ranks for p in order[step * per_rank : (step + 1) * per_rank]}
        width = per_rank * world
        assert batch == set(single[step * width : (step + 1) * width])
    together = [p for order in ranks for p in order]
    assert len(set(together)) == len(together) == size // world * world


def test_more_ranks_than_images_gives_no_step() -> None:
    assert positions(2, world=3) == [[], [], []]


def test_takes_the_arguments_of_basicsr_and_the_seed_of_the_data_set() -> None:
    dataset = SeededDataset(list(range(30)), seed=9)
    sampler = PositionSampler(dataset, 1, 0, 2)
    assert [p for _, p in sampler] == positions(30, ratio=2, seed=9)[0]
    assert len(sampler) == math.ceil(60)
