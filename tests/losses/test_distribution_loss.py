from __future__ import annotations

import math

import pytest
import torch
from basicsr.losses import build_loss

from kdsr.losses.distribution_loss import CELoss, code_distribution, distribution_cross_entropy
from kdsr.runtime.errors import OptionError


@pytest.mark.parametrize(
    ("variant", "expected"), [({}, "ce_released_code"), ({"variant": "equation_9"}, "ce_equation_9")]
)
def test_release_values(golden, variant, expected):
    options = {"type": "CELoss", "loss_weight": golden.vector["ce_weight"], "reduction": "mean", **variant}
    loss = build_loss(options)(golden.logits["student"], golden.logits["teacher"])
    assert golden.relative_error(loss, expected) < 1e-5


def test_equation_9_gradient(golden):
    criterion = CELoss(golden.vector["ce_weight"], variant="equation_9")
    loss = criterion(golden.logits["student"], golden.logits["teacher"])
    assert golden.relative_error(golden.gradient(loss), "ce_equation_9_grad") < 1e-4


@pytest.mark.parametrize("image", ["student", "teacher"])
def test_release_distribution(golden, image):
    distribution = code_distribution(golden.logits[image])
    torch.testing.assert_close(distribution, golden.vector["distribution"][image], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(distribution.sum(1), torch.ones(len(distribution)))


def test_value_by_hand():
    student, teacher = torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = -0.25 * math.log(0.2) - 0.75 * math.log(0.8)
    assert distribution_cross_entropy(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    twice = math.log(math.exp(0.2) + math.exp(0.8)) - 0.25 * 0.2 - 0.75 * 0.8
    assert distribution_cross_entropy(student, teacher, variant="released").item() == pytest.approx(
        twice, rel=1e-6
    )


def test_smallest_where_the_student_has_the_teachers_distribution():
    teacher = torch.randn(7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    loss = distribution_cross_entropy(student, teacher)
    probabilities = teacher.softmax(1)
    assert loss.item() == pytest.approx(-(probabilities * probabilities.log()).sum(1).mean().item())
    loss.backward()
    assert student.grad.abs().max() < 1e-12


def test_double_softmax_carries_almost_no_signal():
    teacher = torch.full((1, 1024), -1000.0)
    teacher[0, 3] = 0
    best, worst = teacher.clone(), teacher.roll(1, 1)
    values = [
        distribution_cross_entropy(logits, teacher, variant="released").item() for logits in (best, worst)
    ]
    assert values == pytest.approx([5.93, 6.93], abs=0.01)
    assert distribution_cross_entropy(worst, teacher).item() == pytest.approx(1000)


def test_sum_is_over_tokens_and_only_the_student_gets_a_gradient():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 8, generator=generator).requires_grad_() for _ in range(2))
    total = distribution_cross_entropy(student, teacher, reduction="sum")
    torch.testing.assert_close(total, 6 * distribution_cross_entropy(student, teacher))
    total.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_narrow_logits_are_compared_in_float32():
    logits = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = distribution_cross_entropy(logits, logits)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distribution_cross_entropy(logits.float(), logits.float()))


@pytest.mark.parametrize(
    "options", [{"variant": "equation_8"}, {"reduction": "none"}], ids=["variant", "reduction"]
)
def test_unknown_values_are_refused(options):
    with pytest.raises(OptionError, match=f"{next(iter(options))} .* is unknown; it can be"):
        CELoss(**options)
