"""Progressive batches: sizes, epochs, and the position of a resumed run."""

from __future__ import annotations

import pytest

from kdsr.data.batch_plan import BatchPlan, PlannedBatches, Stage, last_epoch, progressive_problems
from kdsr.data.samplers import PositionSampler

GROWING = {
    "gt_size": 64,
    "batch_size_per_gpu": 4,
    "progressive": [
        {"after": 3, "gt_size": 96, "batch_size_per_gpu": 3},
        {"after": 5, "gt_size": 128},
        {"after": 20, "batch_size_per_gpu": 1},
    ],
}
Batch = list[tuple[int, int, int | None]]


def epochs(opt: dict, total: int, images: int = 17, ranks: int = 1, rank: int = 0) -> list[list[Batch]]:
    """The batches of each epoch, until ``total`` were made."""
    sampler = PositionSampler(range(images), ranks, rank, 1, seed=5)
    batches = PlannedBatches(sampler, BatchPlan(opt))
    made: list[list[Batch]] = []
    for epoch in range(last_epoch(sampler, BatchPlan(opt), 0, total) + 1):
        sampler.set_epoch(epoch)
        made.append(list(batches))
    return made


def test_the_length_of_each_stage() -> None:
    batches = [batch for epoch in epochs(GROWING, 24) for batch in epoch]
    assert [len(batch) for batch in batches[:24]] == [4] * 3 + [3] * 17 + [1] * 4
    patches = [{patch for _, _, patch in batch} for batch in batches[:24]]
    assert patches == [{64}] * 3 + [{96}] * 2 + [{128}] * 19


def test_no_position_comes_twice_in_an_epoch() -> None:
    for number, epoch in enumerate(epochs(GROWING, 24)):
        positions = [position for batch in epoch for _, position, _ in batch]
        assert len(set(positions)) == len(positions)
        assert {which for batch in epoch for which, _, _ in batch} == {number}


@pytest.mark.parametrize("total", range(1, 40))
def test_the_last_epoch_is_the_one_that_holds_the_last_iteration(total: int) -> None:
    made = [len(epoch) for epoch in epochs(GROWING, total)]
    assert sum(made) >= total > sum(made[:-1])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("done", [1, 3, 4, 5, 9, 20, 22])
def test_a_resumed_run_continues_with_the_same_batches(done: int, ranks: int) -> None:
    for rank in range(ranks):
        whole = [batch for epoch in epochs(GROWING, 30, 19, ranks, rank) for batch in epoch]
        plan = BatchPlan(GROWING)
        position = {"epoch": whole[done - 1][0][0], "samples": 0}
        for iteration, batch in enumerate(whole[:done], start=1):
            if batch[0][0] == position["epoch"]:
                position["samples"] += plan.at(iteration).batch_size * ranks
        sampler = PositionSampler(range(19), ranks, rank, 1, seed=5)
        sampler.resume(**position)
        batches = PlannedBatches(sampler, plan, done)
        resumed: list[Batch] = []
        for epoch in range(position["epoch"], last_epoch(sampler, plan, done, 30) + 1):
            sampler.set_epoch(epoch)
            assert plan.batches(done + len(resumed) + 1, sampler.left(epoch)) == len(made := list(batches))
            resumed += made
        assert resumed[: 30 - done] == whole[done:30]


def test_without_stages_nothing_changes() -> None:
    plan = BatchPlan({"batch_size_per_gpu": 5})
    assert plan.stages == [Stage(0, None, 5)] and plan.patches == [] and plan.largest_batch == 5
    assert plan.batches(7, 14) == 2


def test_accumulated_batches_are_part_of_an_iteration() -> None:
    plan = BatchPlan(GROWING, accumulate=2)
    assert [plan.at(iteration).batch_size for iteration in (1, 3, 4, 20, 21)] == [8, 8, 6, 6, 2]
    assert plan.largest_batch == 8


def test_too_few_images_for_a_batch() -> None:
    sampler = PositionSampler(range(3), 1, 0)
    with pytest.raises(ValueError, match="3 positions per process, 4 in a batch"):
        last_epoch(sampler, BatchPlan(GROWING), 0, 10)


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ({"after": 3}, "expected a list or null"),
        ([{"gt_size": 64}], "d.progressive.0.after: is required"),
        ([{"after": 3, "gtsize": 64}], "d.progressive.0.gtsize: unknown key; did you mean gt_size?"),
        ([{"after": 3}, {"after": 3}], "d.progressive.1.after: 3 must be greater than 3"),
        ([{"after": 3, "gt_size": 0}], "d.progressive.0.gt_size: 0 is below 1"),
        (
            [{"after": 3, "batch_size_per_gpu": True}],
            "d.progressive.0.batch_size_per_gpu: expected a whole number, got True",
        ),
    ],
)
def test_invalid_schedules(stages: object, problem: str) -> None:
    problems = progressive_problems({"gt_size": 64, "progressive": stages}, "d.progressive")
    assert len(problems) == 1 and problem in problems[0]


def test_patches_need_a_first_size() -> None:
    (problem,) = progressive_problems({"progressive": [{"after": 3, "gt_size": 64}]}, "d.progressive")
    assert "the data set itself needs a gt_size" in problem
