from __future__ import annotations

import math

import pytest
import torch
from basicsr.losses import build_loss
from torch.autograd import gradcheck

from kdsr.losses import slkd_loss
from kdsr.losses.brisque import natural_scene_statistics
from kdsr.losses.piqe import edge_texture_statistics
from kdsr.losses.slkd_loss import (
    EdgeTextureLoss,
    NaturalSceneLoss,
    SpatialKLLoss,
    edge_texture_distance,
    natural_scene_distance,
    spatial_kl,
)
from kdsr.runtime.errors import OptionError


def levels(seed: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, channels, size, size, generator=generator, dtype=dtype)
        for channels, size in ((2, 12), (3, 6))
    ]


def test_natural_scenes_of_a_tiny_map_by_hand():
    # The teacher is flat: c is 1 and all its statistics are 0. The student has two pixels side by side, a and b;
    # with the border repeated the mean around the left one is pa + qb (and pb + qa around the right one), where
    # p is the weight of all columns that show a; so both have sigma^2 = pq (b - a)^2.
    a, b = 1.0, 3.0
    taps = [math.exp(-0.5 * (k / (7 / 6)) ** 2) for k in range(4)]
    beyond = sum(taps[1:]) / (2 * sum(taps) - taps[0])
    p, q = 1 - beyond, beyond
    y = q * (b - a) / (math.sqrt(p * q) * (b - a) + 1)  # of the right pixel; the left one has -y
    product = -y * y
    scale_1 = [
        y * y,
        y * y / (y * y + 1e-6),
        product,
        -product,
        0,
        1,
    ]  # the three other directions have no pairs
    # scale 1/2 is one pixel: all 0, but for the 1e-10 that an empty standard deviation becomes
    student, teacher = torch.tensor([[[[a, b]]]]).double(), torch.zeros(1, 1, 1, 2).double()
    loss = natural_scene_distance([student], [teacher])
    assert loss.item() == pytest.approx(sum(abs(v) for v in scale_1) / 36, rel=1e-6)


def test_edges_of_a_tiny_map_by_hand():
    # one block of a student that has a bright spot, of a teacher that is flat
    student = torch.zeros(1, 1, 4, 4).double()
    student[..., 1, 2] = 5.0
    of_student = edge_texture_statistics(student, 1.0, block=4, softness=0.05).flatten()
    # a flat block is hardly active, its edges are flat; 1e-5 stands for a standard deviation of 0
    mask = 1 / (1 + math.exp(0.1 / 0.05))
    distorted = mask / (1 + math.exp(-(0.1 - 1e-5) / 0.05))
    ratio = 1e-5 / (1e-5 + 1e-3)
    beta = (ratio - 1e-5) / (ratio + 1e-3)
    noisy = mask / (1 + math.exp((2 * beta - 1e-5) / (5 * 0.05)))
    of_teacher = [0, mask, 1e-5, 1e-5, 1e-5, 1e-5, distorted, noisy]
    expected = sum(abs(s - t) for s, t in zip(of_student.tolist(), of_teacher, strict=True)) / 8
    loss = edge_texture_distance([student], [torch.zeros_like(student)], [4], softness=0.05)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert loss.item() > 0.05


def test_levels_are_summed_and_weighted():
    student, teacher = levels(0), levels(1)
    scenes = build_loss({"type": "NaturalSceneLoss", "loss_weight": 0.1})
    each = [natural_scene_distance([s], [t]) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(scenes(student, teacher), 0.1 * (each[0] + each[1]))
    edges = build_loss({"type": "EdgeTextureLoss", "loss_weight": 0.1, "block_size": 8, "softness": 0.1})
    each = [
        edge_texture_distance([s], [t], [stride], full_block=8, softness=0.1)
        for s, t, stride in zip(student, teacher, (1, 2), strict=True)
    ]
    torch.testing.assert_close(edges(student, teacher, [1, 2]), 0.1 * (each[0] + each[1]))


def test_constant_is_the_teachers():
    student, teacher = levels(0)[:1], [100 * levels(1)[0]]
    c = (teacher[0].max() - teacher[0].min()) / 255
    expected = natural_scene_statistics(student[0], c) - natural_scene_statistics(teacher[0], c)
    torch.testing.assert_close(natural_scene_distance(student, teacher), expected.abs().mean())


@pytest.mark.parametrize(
    "distance",
    [natural_scene_distance, lambda s, t: edge_texture_distance(s, t, [2, 4])],
    ids=["natural scenes", "edges"],
)
def test_distance(distance):
    student, teacher = levels(0), levels(1)
    assert distance(student, student).item() == 0
    for level in student + teacher:
        level.requires_grad_()
    distance(student, teacher).backward()
    assert all(level.grad.abs().sum() > 0 for level in student)
    assert all(level.grad is None for level in teacher)
    small = [level[:1, :1, :5, :5].detach().requires_grad_() for level in student]
    assert gradcheck(lambda *s: distance(s, [level[:1, :1, :5, :5] for level in teacher]), small)


@pytest.mark.parametrize(
    "distance",
    [natural_scene_distance, lambda s, t: edge_texture_distance(s, t, [4])],
    ids=["natural scenes", "edges"],
)
@pytest.mark.parametrize("maps", [1, 3, 5, 11, 100])
def test_slices_and_memory_layout_change_nothing(distance, maps, monkeypatch):
    # slices of some maps of an image, of one image, of two, of all; features of both layouts, and of neither
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 5, 20, 18, dtype=torch.float64) for _ in range(2))
    whole = student.clone().requires_grad_()
    expected = distance([whole], [teacher])
    (slope,) = torch.autograd.grad(expected, whole)
    monkeypatch.setattr(slkd_loss, "SLICE", maps * 20 * 18)
    layouts = [
        lambda x: x.clone(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], 2)[:, :, 0],
    ]
    for ours in layouts:
        for theirs in layouts[:2]:
            features = ours(student).requires_grad_()
            found = distance([features], [theirs(teacher)])
            torch.testing.assert_close(found, expected)
            (gradient,) = torch.autograd.grad(found, features)
            torch.testing.assert_close(gradient, slope)
            if ours in layouts[:2]:
                assert gradient.stride() == features.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_under_autocast(dtype):
    student = [level.to(dtype).requires_grad_() for level in levels(0)]
    teacher = [level.to(dtype) for level in levels(1)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = NaturalSceneLoss()(student, teacher) + EdgeTextureLoss()(student, teacher, [2, 4])
        loss = loss + SpatialKLLoss()(student[0], teacher[0])
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(level.grad.dtype == dtype and level.grad.isfinite().all() for level in student)


@pytest.mark.parametrize("distance", [natural_scene_distance, lambda s, t: edge_texture_distance(s, t, [1])])
def test_gradient_in_half_precision_is_what_the_loss_scale_made_of_it(distance):
    # of a mean over 150,000 values it is some 1e-8, which half precision does not know
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(1, 4, 192, 192, generator=generator).half() for _ in range(2))
    gradients = []
    for features in (student.clone(), student.float()):
        (0.1 * 2**16 * distance([features.requires_grad_()], [teacher])).backward()
        gradients.append(features.grad)
    assert gradients[0].dtype == torch.float16
    assert (gradients[0] == 0).float().mean() < 0.01
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("ratio, most", [(1, 1.1), (100, 1.1), (1000, 20)])
def test_a_students_large_range_gives_no_extreme_gradient(ratio, most):
    # the repeated border is flat but for rounding noise, which grows with the student's range
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (torch.randn(2, 1, 17, 33, generator=generator) for _ in range(2))
        norms = []
        for dtype in (torch.float32, torch.float64):
            features = (ratio * student).to(dtype).requires_grad_()
            edge_texture_distance([features], [teacher.to(dtype)], [2]).backward()
            norms.append(features.grad.norm().item())
        assert norms[0] < most * norms[1]


def test_a_dead_teacher_and_a_dead_student_give_numbers():
    flat, moving = [torch.zeros(1, 2, 8, 8)], [torch.randn(1, 2, 8, 8)]
    for student, teacher in ((flat, moving), (moving, flat), (flat, flat)):
        student = [level.clone().requires_grad_() for level in student]
        loss = NaturalSceneLoss()(student, teacher) + EdgeTextureLoss()(student, teacher, [4])
        loss.backward()
        assert loss.isfinite()
        assert student[0].grad.isfinite().all()


def test_kl_by_hand():
    student = torch.tensor([0.0, math.log(3)]).view(1, 1, 1, 2)  # softmax: 1/4, 3/4
    teacher = torch.tensor([0.0, 0.0]).view(1, 1, 1, 2)  # 1/2, 1/2
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert spatial_kl(student, teacher).item() == pytest.approx(expected)
    # at temperature 2 the student's odds are sqrt(3)
    quarter = 1 / (1 + math.sqrt(3))
    expected = 4 * (0.5 * math.log(0.5 / quarter) + 0.5 * math.log(0.5 / (1 - quarter)))
    assert spatial_kl(student, teacher, 2.0).item() == pytest.approx(expected)
    # over channels and images it is a mean
    both = torch.cat([student, teacher], 1)
    loss = build_loss({"type": "SpatialKLLoss", "loss_weight": 0.5, "temperature": 2.0})
    assert loss(both, teacher.expand_as(both)).item() == pytest.approx(expected / 4)


def test_kl_gradient_reaches_the_student_only():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    spatial_kl(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert gradcheck(lambda s: spatial_kl(s, teacher.detach(), 0.5), student)
    assert spatial_kl(student, student).item() == pytest.approx(0, abs=1e-12)


def test_mismatched_shapes_are_refused():
    student, teacher = levels(0), levels(1)
    with pytest.raises(ValueError, match="2 levels of the student and 1 of the teacher"):
        natural_scene_distance(student, teacher[:1])
    with pytest.raises(ValueError, match="level 1"):
        natural_scene_distance(student, [teacher[0], teacher[0]])
    with pytest.raises(ValueError, match="2 levels, but 1 strides"):
        edge_texture_distance(student, teacher, [1])
    with pytest.raises(ValueError, match="differ"):
        spatial_kl(student[0], teacher[1])


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (EdgeTextureLoss, {"block_size": 3}),
        (EdgeTextureLoss, {"block_size": 2}),
        (EdgeTextureLoss, {"softness": 0}),
        (SpatialKLLoss, {"temperature": 0}),
    ],
)
def test_invalid_values_are_refused(loss, options):
    with pytest.raises(OptionError, match=f"{loss.__name__}: {next(iter(options))} "):
        loss(**options)
