from __future__ import annotations

import pytest
import torch
from basicsr.losses import build_loss
from torch.autograd import gradcheck

from kdsr.losses.relation_loss import RKDLoss, relation_distance, relations
from kdsr.runtime.errors import OptionError


def features(seed: int, channels: int, samples: int = 4, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(samples, channels, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


ON_A_LINE = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1)
TRIANGLE = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]).view(3, 2, 1, 1)


def test_relations_by_hand():
    distances, cosines = relations(TRIANGLE.flatten(1))  # sides 3, 4, 5: their mean is 4
    torch.testing.assert_close(distances, torch.tensor([[0, 0.75, 1], [0.75, 0, 1.25], [1, 1.25, 0]]))
    corners = [cosines[0, 1, 2], cosines[1, 0, 2], cosines[2, 0, 1]]
    assert [float(cosine) for cosine in corners] == pytest.approx([0, 0.6, 0.8])
    torch.testing.assert_close(cosines, cosines.mT)


def test_value_by_hand():
    # distances 0.5, 1.5, 1 of the student, 0.75, 1, 1.25 of the teacher, each twice of nine
    distance = 2 / 9 * 0.5 * (0.25**2 + 0.5**2 + 0.25**2)
    # cosines 1, -1, 1 of the student, 0, 0.6, 0.8 of the teacher, each twice of 27; 1.6 is beyond Huber's 1
    angle = 2 / 27 * (0.5 + (1.6 - 0.5) + 0.5 * 0.2**2)
    found = [float(value) for value in relation_distance(ON_A_LINE, TRIANGLE)]
    assert found == pytest.approx([distance, angle])
    loss = build_loss({"type": "RKDLoss", "loss_weight": 0.5})
    value = loss([ON_A_LINE, TRIANGLE], [TRIANGLE, TRIANGLE])  # the mean of two levels, one of them perfect
    assert value.item() == pytest.approx(0.5 * (25 * distance + 50 * angle) / 2)


def test_positions_are_averaged():
    student, teacher = features(0, 3), features(1, 5)
    expected = relation_distance(student.mean((2, 3), keepdim=True), teacher.mean((2, 3), keepdim=True))
    torch.testing.assert_close(relation_distance(student, teacher), expected)


def test_scale_shift_and_rotation_change_nothing():
    teacher = features(1, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    student = torch.einsum("dc,nchw->ndhw", 3 * rotation, teacher) + 2
    assert [float(value) for value in relation_distance(student, teacher)] == pytest.approx([0, 0], abs=1e-12)


def test_gradient_is_the_one_of_its_equation():
    student, teacher = features(0, 3).requires_grad_(), features(1, 5)
    assert gradcheck(lambda s: relation_distance(s, teacher), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_the_student_and_never_the_teacher(dtype):
    student = [features(seed, 3, dtype=dtype).requires_grad_() for seed in (0, 1)]
    teacher = [features(seed, 5, dtype=dtype).requires_grad_() for seed in (2, 3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = RKDLoss()(student, teacher)
    assert value.dtype == torch.float32
    value.backward()
    assert all(level.grad.abs().sum() > 0 and level.grad.isfinite().all() for level in student)
    assert all(level.grad is None for level in teacher)


@pytest.mark.parametrize("alike", [2, 3])
def test_identical_samples_give_numbers_and_gradients_of_ordinary_size(alike):
    one = features(0, 3, 1, torch.float32)
    samples = torch.cat([one] * alike + [features(1, 3, 4 - alike, torch.float32)])
    for student, teacher in ((samples, features(2, 5, 4, torch.float32)), (samples, samples.flip(0))):
        student = student.clone().requires_grad_()
        value = RKDLoss()([student], [teacher])
        value.backward()
        assert value.isfinite() and student.grad.isfinite().all() and student.grad.abs().max() < 1e3


def test_a_batch_of_equal_images_gives_numbers():
    student = torch.ones(3, 2, 4, 4, requires_grad=True)
    value = RKDLoss()([student], [torch.zeros(3, 2, 4, 4)])
    value.backward()
    assert value.item() == 0 and student.grad.isfinite().all()


def test_two_samples_give_zero():
    student = features(0, 3, 2).requires_grad_()
    value = RKDLoss()([student], [features(1, 5, 2)])
    value.backward()
    assert value.item() < 1e-28 and student.grad.abs().max() < 1e-13


def test_one_sample_is_refused_with_the_option_to_change():
    with pytest.raises(OptionError, match=r"has one: set datasets\.train\.batch_size_per_gpu to 3 or more"):
        RKDLoss()([features(0, 3, 1)], [features(1, 3, 1)])


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match="1 levels of the student and 2 of the teacher"):
        RKDLoss()([features(0, 3)], [features(1, 3)] * 2)
    with pytest.raises(ValueError, match="RKD, level 0"):
        RKDLoss()([features(0, 3, 4)], [features(1, 3, 5)])
