from __future__ import annotations

import math

import numpy as np
import pytest
import skimage.color
import skimage.data
import torch
from scipy import ndimage, optimize, special
from torch import Tensor
from torch.autograd import gradcheck

from kdsr.losses import brisque
from kdsr.losses.brisque import natural_scene_statistics

PHOTOS = ("astronaut", "camera", "chelsea", "coffee", "rocket")
ODD = [(1, 1), (1, 7), (6, 1), (2, 2), (5, 9)]

SHAPES = (0.2, 10.0)  # range of the generalised Gaussian's shape (as in the authors' search)


def luma(name: str) -> np.ndarray:
    image = getattr(skimage.data, name)()
    return image.astype(float) if image.ndim == 2 else skimage.color.rgb2gray(image) * 255


# ----- BRISQUE's own features, from the moments that the statistics are computed from


def _log_gammas(shape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.lgamma(1 / shape), torch.lgamma(2 / shape), torch.lgamma(3 / shape)


def gamma_ratio(shape: Tensor) -> Tensor:
    """(E|y|)^2 / E[y^2] of a generalised Gaussian: ``G(2/a)^2 / (G(1/a) G(3/a))``, increasing from 0 to 3/4."""
    one, two, three = _log_gammas(shape)
    return torch.exp(2 * two - one - three)


def inverse_gamma_ratio(ratio: Tensor) -> Tensor:
    """The inverse of ``gamma_ratio``: a shape in [0.2, 10] (float64), differentiable.

    Ratios outside this range give an end of it, without gradient.
    """
    low, high = (torch.full_like(ratio, math.log(end)).detach() for end in SHAPES)
    for _ in range(48):  # bisection to 1e-14
        middle = (low + high) / 2
        below = gamma_ratio(middle.exp()) < ratio.detach()
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    shape = ((low + high) / 2).exp()
    one, two, three = (torch.digamma(k / shape) * k for k in (1, 2, 3))
    value = gamma_ratio(shape)
    slope = value * (one + three - 2 * two) / shape.square()
    ends = [gamma_ratio(torch.full_like(shape, end)) for end in SHAPES]
    inside = (ratio > ends[0]) & (ratio < ends[1])
    # one Newton step adds the derivative of the inverse function, and changes the value by about 1e-14
    return shape + torch.where(inside, (ratio - value) / slope, torch.zeros_like(ratio))


def brisque_features(luma: Tensor) -> Tensor:
    """BRISQUE's 36 features of an image (Mittal et al. 2012, Table I), by moment matching.

    Per scale (1, then 1/2 by 2x2 mean): a and sigma^2 of the generalised Gaussian of the MSCN coefficients; then, of
    the asymmetric generalised Gaussian of each neighbour product (right, below, below right, above right): a, eta,
    sigma_l^2, sigma_r^2, with eta = (sigma_r - sigma_l) G(2/a) / sqrt(G(1/a) G(3/a)). Shapes a are in [0.2, 10].
    Pixels without the neighbour are left out; the border does not wrap around.

    Args:
        luma: (N, C, H, W) in [0, 255], usually with C = 1; computed in float64.

    Returns:
        (N, C, 36) in float64.
    """
    m = brisque._moments(luma.double(), 1.0)
    tiny = torch.finfo(m.square.dtype).tiny
    shape = inverse_gamma_ratio(m.absolute.square() / m.square.clamp_min(tiny))
    left, right = m.left.clamp_min(tiny).sqrt(), m.right.clamp_min(tiny).sqrt()
    # (g^3 + 1)(g + 1) / (g^2 + 1)^2 for g = left / right, also if right is 0
    skew = (left**3 + right**3) * (left + right) / (m.left + m.right).square().clamp_min(tiny)
    p_shape = inverse_gamma_ratio(skew * m.p_absolute.square() / m.p_square.clamp_min(tiny))
    one, two, three = _log_gammas(p_shape)
    eta = (right - left) * torch.exp(two - (one + three) / 2)
    return brisque._in_order([shape, m.square], [p_shape, eta, m.left, m.right])


# ----- BRISQUE once more, with scipy ------------------------------------------------------------------------


def reference_mscn(image: np.ndarray, c: float) -> np.ndarray:
    axis = np.exp(-0.5 * (np.arange(-3, 4) / (7 / 6)) ** 2)
    window = np.outer(axis, axis) / axis.sum() ** 2
    mean = ndimage.correlate(image, window, mode="nearest")
    deviation = np.sqrt(np.abs(ndimage.correlate(image**2, window, mode="nearest") - mean**2))
    y = (image - mean) / (deviation + c)
    y[np.abs(y) < 1e-9] = 0  # flat (astronaut has black corners): no more than rounding
    return y


def reference_products(y: np.ndarray) -> list[np.ndarray]:
    return [y[:, :-1] * y[:, 1:], y[:-1] * y[1:], y[:-1, :-1] * y[1:, 1:], y[1:, :-1] * y[:-1, 1:]]


def reference_shape(ratio: float) -> float:
    def excess(a: float) -> float:
        return special.gamma(2 / a) ** 2 / (special.gamma(1 / a) * special.gamma(3 / a)) - ratio

    return optimize.brentq(excess, 0.2, 10)


def reference_classic(y: np.ndarray) -> list[float]:
    features = [reference_shape(np.abs(y).mean() ** 2 / (y**2).mean()), (y**2).mean()]
    for p in reference_products(y):
        left, right = np.sqrt((p[p < 0] ** 2).mean()), np.sqrt((p[p > 0] ** 2).mean())
        skew = left / right
        ratio = np.abs(p).mean() ** 2 / (p**2).mean()
        a = reference_shape(ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2)
        gammas = [special.gamma(k / a) for k in (1, 2, 3)]
        eta = (right - left) * gammas[1] / np.sqrt(gammas[0] * gammas[2])
        features += [a, eta, left**2, right**2]
    return features


def reference_statistics(y: np.ndarray) -> list[float]:
    features = [(y**2).mean(), np.abs(y).mean() ** 2 / (y**2).mean()]
    for p in reference_products(y):
        features += [p.mean(), np.sqrt((p[p < 0] ** 2).mean()), np.sqrt((p[p > 0] ** 2).mean())]
        features += [np.abs(p).mean() ** 2 / (p**2).mean()]
    return features


def reference(image: np.ndarray, c: float, of_scale) -> np.ndarray:
    height, width = (size // 2 * 2 for size in image.shape)
    half = image[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    return np.array([number for scaled in (image, half) for number in of_scale(reference_mscn(scaled, c))])


@pytest.mark.parametrize("name", PHOTOS)
def test_classic_features_of_photographs(name):
    image = luma(name)
    features = brisque_features(torch.from_numpy(image)[None, None])
    assert features.shape == (1, 1, 36)
    np.testing.assert_allclose(features[0, 0], reference(image, 1.0, reference_classic), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PHOTOS)
def test_differentiable_statistics_of_photographs(name, dtype):
    image = luma(name) / 255
    statistics = natural_scene_statistics(torch.from_numpy(image)[None, None].to(dtype), 1 / 255)
    assert statistics.dtype == dtype
    # 1e-6 in the shape statistic's denominator is what remains in float64
    rtol = 1e-4 if dtype == torch.float64 else 2e-3
    np.testing.assert_allclose(statistics[0, 0], reference(image, 1 / 255, reference_statistics), rtol=rtol)


# ----- properties -------------------------------------------------------------------------------------------


def test_channels_and_images_do_not_mix():
    maps = torch.rand(2, 3, 12, 10, dtype=torch.float64)
    together = natural_scene_statistics(maps, 0.1)
    for image in range(2):
        for channel in range(3):
            alone = natural_scene_statistics(maps[image, channel][None, None], 0.1)
            torch.testing.assert_close(together[image, channel], alone[0, 0])


def test_shape_is_recovered_from_samples():
    generator = np.random.default_rng(0)
    # |y|^a of a generalised Gaussian is gamma-distributed
    for shape in (0.5, 1.0, 2.0, 4.0):
        samples = torch.from_numpy(generator.gamma(1 / shape, size=400_000) ** (1 / shape))
        found = inverse_gamma_ratio(samples.mean() ** 2 / samples.square().mean())
        assert found.item() == pytest.approx(shape, rel=0.02)


def test_inverse_gamma_ratio():
    shapes = torch.tensor([0.21, 0.5, 1.0, 2.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(inverse_gamma_ratio(gamma_ratio(shapes)), shapes, rtol=1e-10, atol=0)
    assert gamma_ratio(torch.tensor(2.0, dtype=torch.float64)).item() == pytest.approx(2 / math.pi)  # normal
    assert gamma_ratio(torch.tensor(1.0, dtype=torch.float64)).item() == pytest.approx(0.5)  # Laplace
    beyond = torch.tensor([0.0, 0.9], dtype=torch.float64, requires_grad=True)
    ends = inverse_gamma_ratio(beyond)
    torch.testing.assert_close(ends.detach(), torch.tensor([0.2, 10.0], dtype=torch.float64))
    ends.sum().backward()
    assert beyond.grad.tolist() == [0, 0]
    inside = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    assert gradcheck(inverse_gamma_ratio, inside)


@pytest.mark.parametrize("size", ODD)
def test_gradients_of_the_statistics(size):
    torch.manual_seed(1)
    maps = torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: natural_scene_statistics(x, 0.1), maps)


@pytest.mark.parametrize("size", [(1, 7), (5, 6)])
def test_gradients_of_the_classic_features(size):
    torch.manual_seed(1)
    maps = (100 * torch.rand(1, 1, *size, dtype=torch.float64)).requires_grad_()
    assert gradcheck(brisque_features, maps)


@pytest.mark.parametrize("of_maps", [lambda x: natural_scene_statistics(x, 0.1), brisque_features])
@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_flat_maps_give_numbers(of_maps, size, dtype):
    half_flat = torch.randn(*size)
    half_flat[: (size[0] + 1) // 2] = 0.5
    for flat in (torch.zeros(size), torch.full(size, 0.3), torch.full(size, -7.0), half_flat):
        maps = flat.to(dtype)[None, None].clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            features = of_maps(maps)
        assert features.isfinite().all()
        features.sum().backward()
        assert maps.grad.isfinite().all()


def test_rounding_noise_on_a_flat_channel_gives_no_extreme_gradient():
    torch.manual_seed(2)
    for level in (0.0, 1.0, 100.0):
        noisy = level + 1e-5 * torch.randn(1, 1, 16, 16)
        maps = noisy.clone().requires_grad_()
        natural_scene_statistics(maps, 0.1).mean().backward()
        assert maps.grad.abs().max() < 100


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", ODD)
def test_directions_at_once_are_those_one_by_one(size, layout, monkeypatch):
    torch.manual_seed(1)
    maps = torch.randn(2, 2, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weights = torch.randn(2, 2, 36, dtype=torch.float64)
    found = []
    for most in (0, maps.numel()):
        monkeypatch.setattr(brisque, "AT_ONCE", most)
        statistics = natural_scene_statistics(maps, 0.1)
        found.append((statistics, *torch.autograd.grad((statistics * weights).sum(), maps)))
    for one_by_one, at_once in zip(*found, strict=True):
        torch.testing.assert_close(one_by_one, at_once)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("at_once", [0, 1000])
@pytest.mark.parametrize("zeros", [False, True])
def test_sums_of_products(zeros, at_once, layout, monkeypatch):
    monkeypatch.setattr(brisque, "AT_ONCE", at_once)
    torch.manual_seed(1)
    y = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    if zeros:
        y[torch.rand(y.shape) < 0.3] = 0
    of_pixels, of_pairs = brisque._Sums.apply(y.contiguous(memory_format=layout))
    torch.testing.assert_close(of_pixels, torch.stack([y.abs().sum((2, 3)), y.square().sum((2, 3))]))
    for image in range(2):
        for channel in range(3):
            for direction, p in enumerate(reference_products(y[image, channel].numpy())):
                up, low = p[p > 0], -p[p < 0]
                expected = [up.sum(), low.sum(), (up**2).sum(), (low**2).sum(), up.size, low.size]
                found = of_pairs[:, direction, image, channel]
                assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_autocast_changes_nothing():
    maps = torch.randn(1, 4, 16, 16)
    plain = natural_scene_statistics(maps, 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(natural_scene_statistics(maps, 0.02), plain)


def test_memory_layout_changes_nothing():
    maps = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(
        natural_scene_statistics(maps.to(memory_format=torch.channels_last), 0.1),
        natural_scene_statistics(maps, 0.1),
    )
