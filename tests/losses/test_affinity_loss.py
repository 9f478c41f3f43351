from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from basicsr.losses import build_loss
from torch.autograd import gradcheck

from kdsr.losses import affinity_loss
from kdsr.losses.affinity_loss import AffinityLoss, affinity_distance, block_rows, reduced, reduction_factor
from kdsr.runtime.errors import OptionError, TrainingError


def features(seed: int, channels: int, dtype=torch.float64, size: tuple[int, int] = (3, 5)) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The equation, with complete maps."""
    ours, theirs = (F.normalize(x.flatten(2), dim=1) for x in (student, teacher))
    return (ours.mT @ ours - theirs.mT @ theirs).abs().mean()


def test_value_by_hand():
    student = torch.tensor([[3.0, 1.0], [4.0, 0.0]]).view(1, 2, 1, 2)  # (0.6, 0.8) and (1, 0): alike by 0.6
    teacher = torch.tensor([2.0, -1.0]).view(1, 1, 1, 2)  # opposite: -1
    assert affinity_distance([student], [teacher]).item() == pytest.approx(2 * 1.6 / 4)
    loss = build_loss({"type": "AffinityLoss", "loss_weight": 10.0})
    assert loss([student, student], [teacher, teacher]).item() == pytest.approx(
        10 * 2 * 0.8
    )  # levels: summed


@pytest.mark.parametrize("entries", [1, 2 * 15 * 4, 2**18], ids=["rows", "blocks", "whole"])
def test_value_and_gradient_are_the_plain_formulas(entries, monkeypatch):
    monkeypatch.setattr(affinity_loss, "BLOCK_CPU", entries)
    assert block_rows(2, 15, False) == {1: 1, 120: 4}.get(entries, 2**18 // 30)
    student, teacher = features(0, 4).requires_grad_(), features(1, 6)
    ours, expected = affinity_distance([student], [teacher]), plain(student, teacher)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(3 * value, student) for value in (ours, expected)))
    assert gradcheck(lambda s: affinity_distance([s], [teacher]), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [2304, 6], ids=["full", "reduced"])
@pytest.mark.parametrize("reduce", ["pool", "sample"])
def test_gradient_reaches_the_student_and_never_the_teacher(dtype, limit, reduce):
    """A detached loss would have no gradient, and leave plain logits distillation."""
    student = [features(seed, 3, dtype).requires_grad_() for seed in (0, 1)]
    teacher = [features(seed, 4, dtype).requires_grad_() for seed in (2, 3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = AffinityLoss(max_positions=limit, reduce=reduce)(student, teacher)
    assert value.dtype == torch.float32
    value.backward()
    assert all(level.grad.abs().sum() > 0 and level.grad.isfinite().all() for level in student)
    assert all(level.grad is None for level in teacher)


def test_autocast_does_not_round_the_affinities():
    student, teacher = features(0, 8, torch.float32), features(1, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = affinity_distance([student], [teacher])
    assert value.item() == pytest.approx(plain(student.double(), teacher.double()).item(), rel=1e-6)


def test_a_gradient_step_reduces_the_distance():
    student, teacher = features(0, 4).requires_grad_(), features(1, 6)
    before = affinity_distance([student], [teacher])
    before.backward()
    after = affinity_distance([student - student.grad / student.grad.norm() * 0.1], [teacher])
    assert after < before - 1e-3


def test_scale_of_a_position_changes_nothing():
    student, teacher = features(0, 4), features(1, 6)
    scaled = student * torch.rand(2, 1, 3, 5, dtype=torch.float64).add(0.1)
    torch.testing.assert_close(
        affinity_distance([scaled], [teacher]), affinity_distance([student], [teacher])
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
def test_zero_and_equal_features_give_numbers(size):
    for maps in (
        torch.zeros(2, 3, *size),
        torch.ones(2, 3, *size),
        features(0, 3, torch.float32, size).relu(),
    ):
        student = maps.clone().requires_grad_()
        value = affinity_distance([student], [maps])
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert student.grad.isfinite().all() and student.grad.abs().max() < 1e2


@pytest.mark.parametrize(
    ("size", "limit", "factor"),
    [
        ((48, 48), 2304, 1),
        ((48, 49), 2304, 2),
        ((192, 192), 2304, 4),
        ((7, 5), 12, 2),
        ((7, 5), 11, 3),
        ((1, 9), 2, 5),
    ],
)
def test_maps_are_reduced_only_as_far_as_the_limit_asks(size, limit, factor):
    assert reduction_factor(*size, limit) == factor


def test_pooled_and_sampled_maps_by_hand():
    maps = torch.arange(15.0).view(1, 1, 3, 5)
    pooled = torch.tensor(
        [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]
    )  # means of 2x2, at the borders of what there is
    assert torch.equal(reduced(maps, 2, "pool")[0, 0], pooled)
    assert torch.equal(reduced(maps, 2, "sample")[0, 0], torch.tensor([[6.0, 8.0, 9.0], [11.0, 13.0, 14.0]]))
    assert reduced(maps, 1, "pool") is maps
    assert (
        reduced(torch.zeros(1, 1, 1, 9), 5, "pool").shape
        == reduced(torch.zeros(1, 1, 1, 9), 5, "sample").shape
    )


@pytest.mark.parametrize("reduce", ["pool", "sample"])
def test_above_the_limit_the_reduced_maps_are_compared(reduce):
    student, teacher = features(0, 4), features(1, 6)
    value = affinity_distance([student], [teacher], max_positions=6, reduce=reduce)
    torch.testing.assert_close(value, plain(reduced(student, 2, reduce), reduced(teacher, 2, reduce)))
    state = torch.get_rng_state()
    affinity_distance([student], [teacher], max_positions=6, reduce=reduce)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn


def test_the_form_is_described():
    assert AffinityLoss().form(48, 48) == "full, 48x48 positions"
    assert AffinityLoss().form(96, 96) == "pooled to 48x48 of 96x96 positions"
    assert (
        AffinityLoss(max_positions=100, reduce="sample").form(48, 40) == "sampled to 10x8 of 48x40 positions"
    )


def test_the_affinities_are_never_complete_in_memory():
    """25 million affinities: the saved tensors have the size of the features."""
    student = torch.randn(1, 2, 50, 100, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        value = affinity_distance([student], [student.detach().flip(3)], max_positions=5000)
    assert sum(kept) <= 10 * student.numel()
    value.backward()
    assert student.grad.abs().sum() > 0


def test_out_of_memory_gives_a_remedy():
    endless = torch.zeros(1).expand(2, 8, 2**20, 2**20)
    with pytest.raises(TrainingError) as error:
        affinity_distance([endless], [endless], max_positions=2**41)
    message = str(error.value)
    assert "level 0: out of memory" in message and "2 maps of 1048576x1048576" in message and "GiB" in message
    for option in ("max_positions", "pool", "sample", "gt_size", "batch_size_per_gpu"):
        assert option in message


def test_mismatched_shapes_are_refused():
    student, teacher = features(0, 3), features(1, 3)
    with pytest.raises(ValueError, match="1 levels of the student and 2 of the teacher"):
        affinity_distance([student], [teacher] * 2)
    with pytest.raises(ValueError, match="FAKD, level 0.*resize the student's"):
        affinity_distance([student], [teacher[..., 1:]])


@pytest.mark.parametrize("options", [{"reduce": "max"}, {"max_positions": 1}], ids=str)
def test_invalid_values_are_refused(options):
    with pytest.raises(OptionError, match=f"AffinityLoss: {next(iter(options))} "):
        AffinityLoss(**options)
