from __future__ import annotations

import math

import pytest
import torch
from basicsr.losses import build_loss
from torch.autograd import gradcheck

from kdsr.losses.attention_loss import AttentionTransferLoss, attention_distance, attention_map
from kdsr.runtime.errors import OptionError


def levels(seed: int, channels: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, size, 3, generator=generator, dtype=dtype) for size in (4, 2)]


STUDENT = torch.tensor([[1.0, 2.0], [2.0, 0.0]]).view(1, 2, 1, 2)  # Q = (5, 4)
TEACHER = torch.tensor([3.0, 0.0]).view(1, 1, 1, 2)  # Q = (9, 0)
APART = [5 / math.sqrt(41) - 1, 4 / math.sqrt(41)]


def test_map_by_hand():
    assert attention_map(STUDENT).tolist()[0] == pytest.approx([5 / math.sqrt(41), 4 / math.sqrt(41)])
    assert attention_map(TEACHER).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("distance", "expected"), [("norm", math.hypot(*APART)), ("square", math.hypot(*APART) ** 2 / 2)]
)
def test_value_by_hand(distance, expected):
    assert attention_distance([STUDENT], [TEACHER], distance).item() == pytest.approx(expected)
    loss = build_loss({"type": "AttentionTransferLoss", "loss_weight": 2.0, "distance": distance})
    # levels are summed, images averaged
    both = [STUDENT, torch.cat([STUDENT, STUDENT])], [TEACHER, torch.cat([TEACHER, TEACHER])]
    assert loss(*both).item() == pytest.approx(4 * expected)


def test_a_features_scale_and_sign_change_nothing():
    student, teacher = levels(0, 3), levels(1, 4)
    expected = attention_distance(student, teacher)
    torch.testing.assert_close(attention_distance([-7 * level for level in student], teacher), expected)
    assert attention_distance(student, [3 * level for level in student]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("distance", ["norm", "square"])
def test_gradient_is_the_one_of_its_equation(distance):
    student = [level.requires_grad_() for level in levels(0, 3)]
    assert gradcheck(lambda *s: attention_distance(s, levels(1, 4), distance), student)


@pytest.mark.parametrize("distance", ["norm", "square"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_the_student_and_never_the_teacher(distance, dtype):
    student = [level.requires_grad_() for level in levels(0, 3, dtype)]
    teacher = [level.requires_grad_() for level in levels(1, 4, dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = AttentionTransferLoss(distance=distance)(student, teacher)
    assert value.dtype == torch.float32
    value.backward()
    assert all(level.grad.abs().sum() > 0 and level.grad.isfinite().all() for level in student)
    assert all(level.grad is None for level in teacher)


@pytest.mark.parametrize("distance", ["norm", "square"])
@pytest.mark.parametrize("teacher", [torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)])
@pytest.mark.parametrize("student", [torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)])
def test_maps_of_zeros_and_equal_maps_give_numbers(student, teacher, distance):
    student = student.clone().requires_grad_()
    value = attention_distance([student], [teacher], distance)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match="2 levels of the student and 1 of the teacher"):
        attention_distance(levels(0, 3), levels(1, 3)[:1])
    with pytest.raises(ValueError, match="level 0.*resize the student's"):
        attention_distance([STUDENT], [TEACHER.mT])
    with pytest.raises(OptionError, match="distance 'l1' is unknown; it can be norm or square"):
        AttentionTransferLoss(distance="l1")
