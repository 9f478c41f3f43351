from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from skimage import data

from kdsr.runtime.declarations import check_section
from kdsr.terms.dckd import ContrastOptions
from kdsr.terms.dckd_degradations import (
    DegradationPlan,
    apply_plan,
    degrade,
    gaussian_blur,
    gaussian_noise,
    resize,
)

OFF = {"blur_prob": 0.0, "resize_prob": 0.0, "noise_prob": 0.0, "gray_noise_prob": 0.0}


def photographs(samples: int = 3, height: int = 48, width: int = 48, dtype=torch.float32) -> torch.Tensor:
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1).to(dtype) / 255
    return torch.stack([image[:, 60 * i : 60 * i + height, 150 : 150 + width] for i in range(samples)])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plans(number: int, **probabilities: float) -> list[DegradationPlan]:
    generator = seeded()
    return [DegradationPlan.draw(generator, **(OFF | probabilities)) for _ in range(number)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_zero_give_copies(dtype):
    x = photographs(2, dtype=dtype)
    negatives = degrade(x, num=3, **OFF, generator=seeded())
    assert torch.equal(negatives, torch.cat([x, x, x]))


@pytest.mark.parametrize("kind", ["blur_prob", "resize_prob", "noise_prob"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_kind_alone_changes_every_image_and_keeps_its_range(kind, dtype):
    x = photographs(3, 47, 33, dtype)
    negatives = degrade(x, num=4, **(OFF | {kind: 1.0}), generator=seeded())
    assert negatives.shape == (12, 3, 47, 33)
    assert negatives.dtype == dtype
    overshoot = 0.1 if kind == "resize_prob" else 0  # of the bicubic resize
    assert negatives.min() >= -overshoot and negatives.max() <= 1 + overshoot
    differences = (negatives - torch.cat([x] * 4)).abs().mean((1, 2, 3))
    assert (differences > 1e-4).all() and (differences < 0.15).all()


def test_negatives_come_one_after_the_other_and_differ():
    x = photographs(2)
    first, second = degrade(x, num=2, **(OFF | {"noise_prob": 1.0}), generator=seeded()).split(2)
    generator = seeded()
    again = [DegradationPlan.draw(generator, **(OFF | {"noise_prob": 1.0})) for _ in range(2)]
    assert torch.equal(first, apply_plan(x, again[0]))
    assert torch.equal(second, apply_plan(x, again[1]))
    assert not torch.equal(first, second)


def test_generator_state_is_all_that_a_repetition_needs():
    x, everything = photographs(2), dict.fromkeys(OFF, 0.5)
    generator = seeded()
    degrade(x, num=3, **everything, generator=generator)
    state, global_state = generator.get_state(), torch.get_rng_state()
    expected = degrade(x, num=4, **everything, generator=generator)
    resumed = torch.Generator()
    resumed.set_state(state)
    assert torch.equal(degrade(x, num=4, **everything, generator=resumed), expected)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_one_probability_leaves_the_other_draws_as_they_are():
    alone, mixed = plans(20, resize_prob=1.0), plans(20, blur_prob=0.5, resize_prob=1.0, noise_prob=0.5)
    assert [plan.resize for plan in alone] == [plan.resize for plan in mixed]


def test_draws_cover_the_released_ranges():
    drawn = plans(4000, blur_prob=1.0, resize_prob=1.0, noise_prob=0.25)
    axes = [axis for plan in drawn for axis in plan.blur]
    assert {size for size, _ in axes} == {3, 5, 7, 9, 11}
    sigmas = torch.tensor([sigma for _, sigma in axes])
    assert 0.1 <= sigmas.min() < 0.11 and 1.99 < sigmas.max() <= 2.0
    assert any(vertical != horizontal for vertical, horizontal in (plan.blur for plan in drawn))
    scales = torch.tensor([plan.resize[0] for plan in drawn])
    assert 0.5 <= scales.min() < 0.51 and 1.49 < scales.max() <= 1.5
    assert (scales > 1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    modes = [plan.resize[1:] for plan in drawn]
    for there in ("area", "bilinear", "bicubic"):
        for back in ("area", "bilinear", "bicubic"):  # drawn independently
            assert modes.count((there, back)) / 4000 == pytest.approx(1 / 9, abs=0.02)
    noisy = [plan.noise_seed for plan in drawn if plan.noise_seed is not None]
    assert len(noisy) / 4000 == pytest.approx(0.25, abs=0.03)
    assert len(set(noisy)) == len(noisy)


def test_noise_has_the_released_strength():
    x = torch.full((400, 3, 24, 24), 0.5, dtype=torch.float64)
    noise = gaussian_noise(x, 0.0, seeded()) - x
    sigmas = noise.std((1, 2, 3)) * 255
    assert sigmas.min() == pytest.approx(1, abs=0.3) and sigmas.max() == pytest.approx(30, abs=1.5)
    assert sigmas.mean() == pytest.approx(15.5, abs=1)
    standardised = noise / noise.std((1, 2, 3), keepdim=True)
    assert standardised.mean() == pytest.approx(0, abs=0.005)
    assert standardised.pow(4).mean() == pytest.approx(3, abs=0.05)
    channels = torch.corrcoef(standardised.transpose(0, 1).flatten(1))
    assert (channels - torch.eye(3)).abs().max() < 0.01


def test_gray_noise_is_one_field_for_channels_and_batch():
    x = torch.full((300, 3, 16, 16), 0.5, dtype=torch.float64)
    noise = gaussian_noise(x, 0.5, seeded()) - x
    gray = (noise - noise[:, :1]).abs().amax((1, 2, 3)) < 1e-12
    assert gray.double().mean() == pytest.approx(0.5, abs=0.08)
    fields = noise[gray] / noise[gray].std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(fields, fields[:1].expand_as(fields))


def test_noise_is_clipped():
    x = torch.cat([torch.zeros(8, 3, 16, 16), torch.ones(8, 3, 16, 16)])
    noisy = gaussian_noise(x, 0.5, seeded())
    assert noisy.min() == 0 and noisy.max() == 1
    assert noisy[:8].max() > 0.01 and noisy[8:].min() < 0.99


def test_blur_has_its_sigma_along_each_axis_and_keeps_the_mean():
    x = torch.zeros(1, 3, 41, 41, dtype=torch.float64)
    x[..., 20, 20] = 1
    spread = gaussian_blur(x, (11, 0.8), (11, 1.5))[0, 0]
    offsets = torch.arange(41, dtype=torch.float64) - 20
    assert spread.sum() == pytest.approx(1)
    assert math.sqrt((spread.sum(1) * offsets**2).sum()) == pytest.approx(0.8, abs=0.01)
    assert math.sqrt((spread.sum(0) * offsets**2).sum()) == pytest.approx(1.5, abs=0.02)
    photograph = photographs(1, dtype=torch.float64)
    assert gaussian_blur(photograph, (3, 0.1), (3, 0.1)) == pytest.approx(photograph, abs=1e-12)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 9), (5, 48)])
def test_images_smaller_than_a_kernel_go_through(height, width):
    x = photographs(2, height, width)
    plan = DegradationPlan(((11, 2.0), (11, 2.0)), (0.5, "bicubic", "area"), 7, 0.5)
    assert apply_plan(x, plan).shape == x.shape


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_reducing_and_enlarging_loses_detail_but_keeps_the_picture(mode):
    x = photographs(2)
    reduced = apply_plan(x, DegradationPlan(resize=(0.5, mode, mode)))
    detail = [(image[..., 1:] - image[..., :-1]).abs().mean() for image in (x, reduced)]
    assert detail[1] < 0.95 * detail[0]
    assert (reduced - x).square().mean() < 0.01
    assert resize(x, (24, 31), mode).shape == (2, 3, 24, 31)


def test_resizing_truncates_sizes_uses_two_modes_and_does_not_clip():
    row = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64).expand(1, 1, 5, 5)
    # 5 * 0.75 = 3.75 is cut to 3; the means of pixels 0 to 1, 1 to 3 and 3 to 4
    there = F.interpolate(row, size=3, mode="area")
    assert there[0, 0, 0].tolist() == pytest.approx([0, 2 / 3, 1])
    result = apply_plan(row, DegradationPlan(resize=(0.75, "area", "bicubic")))
    # Keys' kernel with a = -0.75, border repeated. The first pixel is at (0 + 0.5) * 3 / 5 - 0.5 = -0.2, 1.2 from
    # the 2/3: weight -0.75 * (1.728 - 7.2 + 9.6 - 4) = -0.096; the others are 0. The last one is its mirror image.
    assert result[0, 0, :, 0].tolist() == pytest.approx([-0.096 * 2 / 3] * 5)
    assert result[0, 0, :, -1].tolist() == pytest.approx([1 + 0.096 / 3] * 5)


def test_bf16_autocast_does_not_round_the_negatives():
    x = photographs(1)
    options = OFF | {"blur_prob": 1.0}
    with torch.autocast("cpu", torch.bfloat16):
        negatives = degrade(x, num=2, **options, generator=seeded())
    assert negatives.dtype == torch.float32
    assert torch.equal(negatives, degrade(x, num=2, **options, generator=seeded()))


def test_what_is_no_probability_is_named():
    good = {"gaussian_blur_prob": 0, "resize_prob": 0.5, "gaussian_noise_prob": 1, "num_neg": 4}
    problems: list[str] = []
    check_section(good, ContrastOptions.declared(), "train", problems)
    assert problems == []
    wrong = good | {"resize_prob": 1.5, "gray_noise_prob": "half"}
    check_section(wrong, ContrastOptions.declared(), "train", problems)
    assert [problem.split(":")[0] for problem in problems] == ["train.resize_prob", "train.gray_noise_prob"]
