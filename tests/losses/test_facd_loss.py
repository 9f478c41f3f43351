from __future__ import annotations

import math

import pytest
import torch
from basicsr.losses import build_loss
from torch.autograd import gradcheck

from kdsr.losses.facd_loss import FACDLoss, contrast, pairwise_distance, patch_gate
from kdsr.runtime.errors import OptionError


def taps(seed: int, samples: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, 4, 3, 5, generator=generator, dtype=dtype) for _ in range(2)]


def test_distance_by_hand():
    maps = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).view(2, 2, 1, 1)  # normalised: (0.6, 0.8) and zeros
    candidates = torch.tensor([[0.0, 5.0], [-2.0, 0.0], [0.06, 0.08]]).view(3, 2, 1, 1)
    expected = torch.tensor([[(0.6 + 0.2) / 2, (1.6 + 0.8) / 2, 0.0], [0.5, 0.5, 0.7]])
    torch.testing.assert_close(pairwise_distance(maps, candidates), expected)


def test_distance_is_the_plain_formula_and_so_is_its_gradient():
    (maps, _), (candidates, _) = taps(0, 3), taps(1, 4)
    maps.requires_grad_()
    plain = torch.nn.functional.normalize(maps, dim=1)[:, None]
    plain = (plain - torch.nn.functional.normalize(candidates, dim=1)[None]).abs().mean((2, 3, 4))
    ours = pairwise_distance(maps, candidates)
    torch.testing.assert_close(ours, plain)
    weights = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), maps), torch.autograd.grad((plain * weights).sum(), maps)
    )
    assert gradcheck(lambda x: pairwise_distance(x, candidates), maps)


def test_whole_maps_are_summed_without_loss():
    generator = torch.Generator().manual_seed(3)
    maps, candidates = torch.rand(1, 64, 192, 192, generator=generator), torch.rand(1, 64, 192, 192)
    wide = pairwise_distance(maps.double(), candidates.double()).item()
    assert pairwise_distance(maps, candidates).item() == pytest.approx(wide, rel=1e-5)


DISTANCES = torch.tensor([[0.1, 0.3, 0.5], [0.4, 0.2, 0.2]], dtype=torch.float64)
OWN = torch.tensor([0, 2])


def test_infonce_by_hand():
    losses, bound = contrast(DISTANCES, OWN, temperature=0.1)
    first = -math.log(math.exp(-1) / (math.exp(-1) + math.exp(-3) + math.exp(-5)))
    second = -math.log(math.exp(-2) / (math.exp(-4) + 2 * math.exp(-2)))
    assert losses.tolist() == pytest.approx([first, second])
    assert bound.tolist() == pytest.approx([math.log(3) - first, math.log(3) - second])


def test_ratio_by_hand():
    losses, bound = contrast(DISTANCES, OWN, kind="ratio", temperature=0.1, eps=0.1)
    assert losses.tolist() == pytest.approx([0.1 / (0.4 + 0.1), 0.2 / (0.3 + 0.1)])
    assert bound.tolist() == pytest.approx(contrast(DISTANCES, OWN, temperature=0.1)[1].tolist())


@pytest.mark.parametrize("kind", ["infonce", "ratio"])
def test_contrast_has_the_gradient_of_its_equation(kind):
    distances = DISTANCES.clone().requires_grad_()
    assert gradcheck(lambda d: contrast(d, OWN, kind=kind, temperature=0.1)[0], distances)
    contrast(distances, OWN, kind=kind)[0].sum().backward()
    rows = torch.arange(2)
    assert (distances.grad[rows, OWN] > 0).all()  # nearer to the own
    others = distances.grad.clone()
    others[rows, OWN] = 0
    assert (others <= 0).all() and others.sum() < 0  # farther from the others


def test_the_bound_of_equal_and_of_distant_candidates():
    equal = torch.full((2, 4), 0.3)
    losses, bound = contrast(equal, torch.tensor([1, 3]))
    assert losses.tolist() == pytest.approx([math.log(4)] * 2)
    assert bound.tolist() == pytest.approx([0, 0], abs=1e-6)
    far = torch.full((1, 4), 1e4)
    far[0, 0] = 0
    assert contrast(far, torch.tensor([0]), temperature=1e-3)[1].item() == pytest.approx(math.log(4))
    near = torch.zeros(1, 4)
    near[0, 0] = 1e4
    assert contrast(near, torch.tensor([0]), temperature=1e-3)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["infonce", "ratio"])
def test_module_averages_taps_and_samples_with_the_gate(kind):
    student, teacher = taps(0, 2), taps(1, 5)
    own, gate = torch.tensor([3, 1]), torch.tensor([0.25, 0.0])
    loss = build_loss({"type": "FACDLoss", "loss_weight": 2.0, "kind": kind, "temperature": 0.1})
    each = [
        contrast(pairwise_distance(s, t), own, kind=kind, temperature=0.1)
        for s, t in zip(student, teacher, strict=True)
    ]
    value, bound = loss(student, teacher, own, gate)
    assert value.item() == pytest.approx(2 * 0.25 * (each[0][0][0] + each[1][0][0]).item() / 2 / 2)
    assert bound.item() == pytest.approx((each[0][1].mean() + each[1][1].mean()).item() / 2)
    ungated, same_bound = loss(student, teacher, own)
    assert ungated.item() == pytest.approx(2 * sum(losses.mean().item() for losses, _ in each) / 2)
    assert same_bound.item() == bound.item()


def test_own_samples_are_the_first_by_default():
    student, teacher = taps(0, 2), taps(1, 5)
    loss = FACDLoss()
    expected = loss(student, teacher, torch.tensor([0, 1]))
    torch.testing.assert_close(loss(student, teacher), expected)


def test_own_sample_is_never_a_negative():
    # The ratio to far negatives does not change with a nearer positive but through d_pos itself.
    distances = DISTANCES.clone()
    before = contrast(distances, OWN, kind="ratio")[0]
    distances[0, 0] /= 2
    assert contrast(distances, OWN, kind="ratio")[0][0].item() == pytest.approx(before[0].item() / 2)


@pytest.mark.parametrize("kind", ["infonce", "ratio"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_the_student_and_never_the_teacher(kind, dtype):
    student = [tap.requires_grad_() for tap in taps(0, 2, dtype)]
    teacher = [tap.requires_grad_() for tap in taps(1, 3, dtype)]
    gate = torch.ones(2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, bound = FACDLoss(kind=kind)(student, teacher, gate=gate)
    assert value.dtype == torch.float32 and not bound.requires_grad
    value.backward()
    assert all(tap.grad.isfinite().all() and tap.grad.abs().sum() > 0 for tap in student)
    assert all(tap.grad is None for tap in teacher) and gate.grad is None


def test_closed_gates_cost_nothing():
    student = [tap.requires_grad_() for tap in taps(0, 2)]
    value, bound = FACDLoss()(student, taps(1, 2), gate=torch.zeros(2))
    value.backward()
    assert value.item() == 0 and bound.isfinite()
    assert all((tap.grad == 0).all() for tap in student)


@pytest.mark.parametrize("size", [(1, 1), (1, 5)])
def test_zero_and_equal_features_give_numbers(size):
    for student in (torch.zeros(2, 3, *size), torch.ones(2, 3, *size)):
        for kind in ("infonce", "ratio"):
            maps = student.clone().requires_grad_()
            value, bound = FACDLoss(kind=kind)([maps], [student])
            value.backward()
            assert value.isfinite() and bound.isfinite() and maps.grad.isfinite().all()


def test_gates_by_hand():
    gt = torch.zeros(3, 1, 1, 2)
    student = torch.tensor([[0.1, -0.3], [0.1, 0.1], [0.2, 0.2]]).view(3, 1, 1, 2)
    teacher = torch.tensor([[0.1, 0.1], [-0.3, 0.1], [0.2, -0.2]]).view(3, 1, 1, 2)
    # mean errors: student 0.2, 0.1, 0.2, teacher 0.1, 0.2, 0.2
    assert patch_gate(student, teacher, gt, "hard").tolist() == [1, 0, 0]  # a draw does not distil
    assert patch_gate(student, teacher, gt, "off").tolist() == [1, 1, 1]
    soft = patch_gate(student, teacher, gt, "soft", temperature=0.05)
    assert soft.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 0.5])


@pytest.mark.parametrize("mode", ["hard", "soft", "off"])
def test_gate_has_no_gradient(mode):
    student, teacher, gt = (torch.rand(2, 3, 4, 4, dtype=torch.bfloat16) for _ in range(3))
    gate = patch_gate(student.requires_grad_(), teacher, gt, mode)
    assert gate.shape == (2,) and gate.dtype == torch.float32 and not gate.requires_grad


def test_one_candidate_is_refused_with_the_options_to_change():
    student, teacher = taps(0, 1), taps(1, 1)
    with pytest.raises(OptionError, match=r"datasets\.train\.batch_size_per_gpu"):
        FACDLoss()(student, teacher)


def test_mismatched_shapes_are_refused():
    student, teacher = taps(0, 2), taps(1, 2)
    with pytest.raises(ValueError, match="2 taps of the student and 1 of the teacher"):
        FACDLoss()(student, teacher[:1])
    with pytest.raises(ValueError, match="tap 1"):
        FACDLoss()(student, [teacher[0], teacher[1][:, :2]])
    with pytest.raises(OptionError, match="gate 'on' is unknown"):
        patch_gate(student[0], student[0], student[0], "on")


@pytest.mark.parametrize("options", [{"kind": "triplet"}, {"temperature": 0}, {"eps": -1}], ids=str)
def test_invalid_values_are_refused(options):
    with pytest.raises(OptionError, match=f"FACDLoss: {next(iter(options))} "):
        FACDLoss(**options)
