"""The metrics of one image: finite or explained, of the image itself and not of normalised values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.functional import normalize

from kdsr.data.resize import imresize
from kdsr.models import psnr_ssim
from kdsr.models.image_metrics import (
    as_image,
    baseline_image,
    calculate_metric,
    is_finite,
    metric_values,
    shape_problem,
    to_8_bits,
    without_normalisation,
)

QUICK = settings(deadline=None, derandomize=True, max_examples=60)


def noise(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@QUICK
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 14), st.sampled_from([1, 3]), st.booleans())
def test_a_metric_has_a_finite_value_or_a_reason(
    height: int, width: int, border: int, channels: int, on_y: bool
) -> None:
    image, gt = noise(height, width, channels), noise(height, width, channels, 1)
    options: dict[str, Any] = {"crop_border": border, "test_y_channel": on_y and channels == 3}
    metrics = {kind: {"type": f"calculate_{kind}", **options} for kind in ("psnr", "ssim")}
    values, problems = metric_values(image, gt, metrics)
    assert values.keys() | problems.keys() == set(metrics) and not values.keys() & problems.keys()
    assert all(np.isfinite(value) for value in values.values())
    left = min(height, width) - 2 * border
    assert ("psnr" in values, "ssim" in values) == (left >= 1, left >= 11)
    for why in problems.values():
        assert f"{height}×{width}" in why and (not border or f"crop_border {border}" in why)


@QUICK
@given(
    st.integers(11, 90), st.integers(11, 90), st.integers(0, 4), st.sampled_from([1, 2, 3, 4]), st.booleans(),
    st.sampled_from([1, 8, 255]), st.integers(0, 10_000),
)  # fmt: skip
def test_psnr_and_ssim_are_those_of_basicsr(
    height: int, width: int, border: int, channels: int, on_y: bool, error: int, seed: int
) -> None:
    height, width = height + 2 * border, width + 2 * border
    gt = noise(height, width, channels, seed)
    wrong = np.random.default_rng(seed).integers(-error, error + 1, gt.shape)
    image = np.clip(gt + wrong, 0, 255).astype(np.uint8)
    if np.array_equal(image, gt):
        image = gt ^ np.uint8(1)
    options = {"crop_border": border, "test_y_channel": on_y}
    assert psnr_ssim.is_supported(image, gt, border)
    assert psnr_ssim.psnr(image, gt, **options) == pytest.approx(
        calculate_psnr(image, gt, **options), abs=1e-4
    )
    assert psnr_ssim.ssim(image, gt, **options) == pytest.approx(
        calculate_ssim(image, gt, **options), abs=1e-6
    )


def test_psnr_of_large_errors_in_a_large_image() -> None:
    image, gt = np.zeros((2500, 2500, 3), np.uint8), np.full((2500, 2500, 3), 255, np.uint8)
    assert abs(psnr_ssim.psnr(image, gt, 0)) < 1e-12 and psnr_ssim.psnr(image, image, 0) == np.inf


@pytest.mark.parametrize(
    "options",
    [{"crop_border": 5}, {"crop_border": 0, "input_order": "CHW"}, {"crop_border": 0, "input_order": "HWC"}],
)
def test_unusual_images_and_options_go_to_basicsr(options: dict[str, Any]) -> None:
    """Too small without the border, or with an option that the faster functions lack."""
    image, gt = noise(18, 3, 18), noise(18, 3, 18, 1)
    found = calculate_metric({"img": image, "img2": gt}, {"type": "calculate_psnr", **options})
    assert found == calculate_psnr(image, gt, **options) or np.isnan(found)


@pytest.mark.parametrize(("size", "has_value"), [((96, 96), False), ((95, 400), False), ((96, 192), True)])
def test_niqe_needs_two_blocks(size: tuple[int, int], has_value: bool) -> None:
    values, problems = metric_values(
        noise(*size, 3), None, {"niqe": {"type": "calculate_niqe", "crop_border": 0}}
    )
    assert ("niqe" in values) == has_value
    assert has_value or "NIQE needs 96×192" in problems["niqe"]


def test_equal_images_have_no_psnr() -> None:
    image = noise(20, 20, 3)
    values, problems = metric_values(image, image, {"psnr": {"type": "calculate_psnr", "crop_border": 0}})
    assert not values and "equals the ground truth" in problems["psnr"]


def test_an_error_of_a_metric_is_reported() -> None:
    metric = {"psnr": {"type": "calculate_psnr", "crop_border": 0, "input_order": "XYZ"}}
    assert metric_values(noise(9, 9, 3), noise(9, 9, 3), metric)[1]["psnr"].startswith(
        "ValueError: Wrong input_order"
    )


@QUICK
@given(st.data(), st.sampled_from([1, 3]), st.integers(0, 10_000))
def test_normalisation_is_undone(data: st.DataObject, channels: int, seed: int) -> None:
    lengths = st.sampled_from([1, channels])
    mean = data.draw(lengths.flatmap(lambda n: st.lists(st.floats(-2, 2), min_size=n, max_size=n)))
    std = data.draw(lengths.flatmap(lambda n: st.lists(st.floats(0.05, 4), min_size=n, max_size=n)))
    image = torch.rand(1, channels, 5, 7, generator=torch.Generator().manual_seed(seed))
    restored = without_normalisation(normalize(image[0].clone(), mean, std)[None], mean, std)
    torch.testing.assert_close(restored, image, atol=1e-5, rtol=1e-5)


def test_a_normalisation_of_other_channels_hides_no_missing_channel() -> None:
    image = torch.rand(1, 1, 4, 4)
    assert without_normalisation(image, [0.4, 0.4, 0.4], [1.0, 1.0, 1.0]).shape == image.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 255, 256, 599])
def test_one_value_in_any_row_counts(value: float, place: int) -> None:
    batch = torch.rand(1, 3, 600, 4)
    assert is_finite(batch)
    batch[0, 1, place, 2] = value
    assert not is_finite(batch)


@QUICK
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]), st.sampled_from([1, 2, 3, 4]))
def test_the_baseline_has_the_size_of_the_ground_truth(
    height: int, width: int, channels: int, scale: int
) -> None:
    lq = noise(height, width, channels)
    image = baseline_image(lq, scale)
    assert image.shape == (height * scale, width * scale, *lq.shape[2:])
    assert np.array_equal(image, lq if scale == 1 else imresize(lq, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_8_bits_are_those_of_basicsr(channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = (torch.rand(1, channels, 300, 40, generator=generator) * 1.2 - 0.1).to(dtype)
    batch[0, :, :256, 0] = ((torch.arange(256) + 0.5) / 255).to(dtype)  # halves
    assert np.array_equal(as_image(batch.clone()), tensor2img([batch]))
    if channels != 4:
        assert np.array_equal(as_image(to_8_bits(batch)), tensor2img([batch]))


def test_8_bits_next_to_every_half_are_those_of_basicsr() -> None:
    """All values of float32 that are near the border between two grey levels."""
    halves = ((np.arange(255) + 0.5) / 255).astype(np.float32).view(np.int32)
    values = (halves[:, None] + np.arange(-60, 61)).astype(np.int32).view(np.float32)
    batch = torch.from_numpy(values)[None, None]
    assert np.array_equal(as_image(batch), tensor2img([batch]))


def test_a_view_of_an_image_is_converted() -> None:
    """Cropped, turned, or with the channels last."""
    batch = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(2))
    for view in (
        batch[..., 3:17, 2:28],
        batch.rot90(1, (-2, -1)),
        batch.contiguous(memory_format=torch.channels_last),
    ):
        assert np.array_equal(as_image(view), tensor2img([view]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_8_bits_on_a_gpu_are_those_of_the_cpu() -> None:
    batch = torch.rand(2, 3, 600, 40) * 1.2 - 0.1
    assert torch.equal(to_8_bits(batch.cuda()).cpu(), to_8_bits(batch))


def test_channels_and_sizes_that_differ_are_explained() -> None:
    grey, colour = noise(8, 8, 1), noise(8, 8, 3)
    assert "set datasets.val.color: y" in str(shape_problem(grey, colour, "datasets.val.color"))
    assert "remove datasets.val.color" in str(shape_problem(colour, grey, "datasets.val.color"))
    assert "8×8 pixels, the ground truth has 9×8" in str(shape_problem(grey, noise(9, 8, 1), "c"))
    assert shape_problem(colour, colour, "c") is None
    assert as_image(torch.rand(1, 1, 8, 8)).shape == grey.shape
