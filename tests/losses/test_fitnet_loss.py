from __future__ import annotations

import pytest
import torch
from basicsr.losses import build_loss
from torch.autograd import gradcheck

from kdsr.losses.fitnet_loss import FitNetLoss, feature_distance
from kdsr.runtime.errors import OptionError


def levels(seed: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, size, size, generator=generator, dtype=dtype) for size in (4, 2)]


@pytest.mark.parametrize(("criterion", "expected"), [("l1", (1.5 + 4) / 2), ("l2", (2.5 + 16) / 2)])
def test_value_by_hand(criterion, expected):
    student = [torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([-1.0]).view(1, 1, 1, 1)]
    teacher = [torch.tensor([2.0, 0.0]).view(1, 2, 1, 1), torch.tensor([3.0]).view(1, 1, 1, 1)]
    assert feature_distance(student, teacher, criterion).item() == pytest.approx(expected)
    loss = build_loss({"type": "FitNetLoss", "loss_weight": 0.5, "criterion": criterion})
    assert loss(student, teacher).item() == pytest.approx(expected / 2)


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_gradient_is_the_one_of_its_equation(criterion):
    student = [level.requires_grad_() for level in levels(0)]
    assert gradcheck(lambda *s: feature_distance(s, levels(1), criterion), student)


@pytest.mark.parametrize("criterion", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_the_student_and_never_the_teacher(criterion, dtype):
    student, teacher = ([level.requires_grad_() for level in levels(seed, dtype)] for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = FitNetLoss(criterion=criterion)(student, teacher)
    assert value.dtype == torch.float32
    value.backward()
    assert all(level.grad.abs().sum() > 0 and level.grad.dtype == dtype for level in student)
    assert all(level.grad is None for level in teacher)


def test_narrow_features_are_summed_in_float32():
    # 2 ** 16 elements of 1.004 cannot be told from 1 in bfloat16, nor their mean
    student, teacher = torch.full((1, 1, 256, 256), 1.0), torch.zeros(1, 1, 256, 256)
    student[..., 0] = 2.0
    value = feature_distance([student.bfloat16()], [teacher.bfloat16()])
    assert value.item() == pytest.approx(1 + 1 / 256, rel=1e-6)


def test_mismatched_shapes_are_refused():
    student, teacher = levels(0), levels(1)
    with pytest.raises(ValueError, match="2 levels of the student and 1 of the teacher"):
        feature_distance(student, teacher[:1])
    with pytest.raises(ValueError, match="level 1.*an adapter has to make them equal"):
        feature_distance(student, [teacher[0], teacher[1][:, :2]])
    with pytest.raises(OptionError, match="criterion 'l3' is unknown; it can be l1 or l2"):
        FitNetLoss(criterion="l3")
