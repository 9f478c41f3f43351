from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import skimage.color
import skimage.data
import torch
from scipy import ndimage
from torch import Tensor
from torch.autograd import gradcheck

from kdsr.losses.mscn import mscn
from kdsr.losses.piqe import (
    ACTIVE_VARIANCE,
    BLOCK,
    SEGMENT_DEVIATION,
    _noise,
    _padded,
    _Variances,
    block_size,
    edge_texture_statistics,
)


def luma(name: str) -> np.ndarray:
    image = getattr(skimage.data, name)()
    return image.astype(float) if image.ndim == 2 else np.round(skimage.color.rgb2gray(image) * 255)


def degraded(name: str, how: str) -> np.ndarray:
    image = luma(name)
    if how == "noisy":
        noise = np.random.default_rng(0).normal(scale=25, size=image.shape)
        return np.clip(np.round(image + noise), 0, 255)
    return ndimage.gaussian_filter(image, 2) if how == "blurred" else image


# ----- PIQE's decisions, from the variances that the statistics are computed from


class PiqeBlocks(NamedTuple):
    """The classic decisions, (N, C, rows, columns) of blocks each; distorted and noisy blocks are active ones."""

    variance: Tensor
    active: Tensor
    distorted: Tensor
    noisy: Tensor


@torch.no_grad()
def piqe_blocks(luma: Tensor) -> PiqeBlocks:
    """The classic decisions of PIQE on 16x16 blocks.

    Args:
        luma: (N, C, H, W) in [0, 255], usually with C = 1; computed in float64.
    """
    variances, lowest = _Variances.apply(mscn(_padded(luma.double(), BLOCK), 1.0), BLOCK)
    active = variances[0] >= ACTIVE_VARIANCE
    distorted = (lowest.amin(0) < SEGMENT_DEVIATION**2) & active
    noisy = (_noise(variances.sqrt(), 1e-12) > 0) & active
    return PiqeBlocks(*(numbers.movedim(3, 1) for numbers in (variances[0], active, distorted, noisy)))


# ----- PIQE's decisions once more, block by block with numpy -------------------------------------------------


def reference_mscn(image: np.ndarray) -> np.ndarray:
    axis = np.exp(-0.5 * (np.arange(-3, 4) / (7 / 6)) ** 2)
    window = np.outer(axis, axis) / axis.sum() ** 2
    mean = ndimage.correlate(image, window, mode="nearest")
    deviation = np.sqrt(np.abs(ndimage.correlate(image**2, window, mode="nearest") - mean**2))
    return (image - mean) / (deviation + 1)


def reference_decisions(block: np.ndarray) -> tuple[bool, bool, bool]:
    if np.var(block, ddof=1) < 0.1:
        return False, False, False
    edges = (block[0], block[-1], block[:, 0], block[:, -1])
    flat = any(np.std(edge[k : k + 6], ddof=1) < 0.1 for edge in edges for k in range(11))
    centre, surround = block[:, 7:9], np.delete(block, [7, 8], axis=1)
    ratio = np.std(centre, ddof=1) / np.std(surround, ddof=1)
    sigma = np.std(block, ddof=1)
    return True, flat, sigma > 2 * abs(sigma - ratio) / max(sigma, ratio)


@pytest.mark.parametrize("how", ["clean", "noisy", "blurred"])
@pytest.mark.parametrize("name", ["astronaut", "camera", "chelsea", "coffee", "rocket"])
def test_every_block_of_a_photograph_equals_the_reference(name, how):
    image = degraded(name, how)
    blocks = piqe_blocks(torch.from_numpy(image)[None, None])
    padded = np.pad(image, [(0, -size % 16) for size in image.shape], mode="edge")
    y = reference_mscn(padded)
    rows, columns = (size // 16 for size in padded.shape)
    assert blocks.active.shape == (1, 1, rows, columns)
    expected = np.array(
        [
            [reference_decisions(y[16 * r : 16 * r + 16, 16 * k : 16 * k + 16]) for k in range(columns)]
            for r in range(rows)
        ]
    )
    for index, found in enumerate((blocks.active, blocks.distorted, blocks.noisy)):
        assert np.array_equal(found[0, 0].numpy(), expected[..., index])


def test_the_photographs_have_blocks_of_every_kind():
    clean, noisy, blurred = (
        piqe_blocks(torch.from_numpy(degraded("camera", how))[None, None])
        for how in ("clean", "noisy", "blurred")
    )
    assert 0 < clean.active.sum() < clean.active.numel()
    assert noisy.noisy.sum() > 1.5 * clean.noisy.sum()
    share = [(one.distorted.sum() / one.active.sum()).item() for one in (clean, blurred, noisy)]
    assert share[1] > share[2] and share[0] > share[2]


# ----- the soft version --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["camera", "chelsea"])
def test_hard_limit_of_the_soft_version_is_the_classic_one(name):
    image = torch.from_numpy(luma(name))[None, None]
    soft = edge_texture_statistics(image, 1.0, softness=1e-7)[0, 0]
    blocks = piqe_blocks(image)
    torch.testing.assert_close(soft[0], blocks.variance[0, 0])
    for number, expected in ((1, blocks.active), (6, blocks.distorted), (7, blocks.noisy)):
        agree = (soft[number] > 0.5) == expected[0, 0]
        # 1e-3 in the soft ratio's denominators may turn a block that lies on the threshold
        assert agree.float().mean() > (0.995 if number == 7 else 0.9999)


def test_numbers_of_one_block_by_hand():
    # MSCN of one 4x4 block is taken as it comes; everything after it is written out here

    torch.manual_seed(0)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    y = mscn(x, 0.1)[0, 0]
    numbers = edge_texture_statistics(x, 0.1, block=4, softness=0.05)[0, 0, :, 0, 0]

    def sigmoid(v):
        return 1 / (1 + torch.exp(-v))

    variance, sigma = y.var(), y.std()
    mask = sigmoid((variance - 0.1) / 0.05)
    edges = [  # segments of two values
        min((edge[k] - edge[k + 1]).abs() / 2**0.5 for k in range(3))
        for edge in (y[0], y[3], y[:, 0], y[:, 3])
    ]
    ratio = y[:, 1:3].std() / (y[:, [0, 3]].std() + 1e-3)
    beta = (sigma - ratio).abs() / (max(sigma, ratio) + 1e-3)
    distorted = mask * sigmoid((0.1 - min(edges)) / 0.05)
    noisy = mask * sigmoid((sigma - 2 * beta) / 0.25)
    expected = torch.stack([variance, mask, *edges, distorted, noisy])
    torch.testing.assert_close(numbers, expected, rtol=1e-7, atol=1e-7)


def test_blocks_do_not_mix():
    torch.manual_seed(0)
    y = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    together = torch.cat(_Variances.apply(y, 8))
    for row in range(2):
        for column in range(3):
            block = y[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            alone = torch.cat(_Variances.apply(block, 8))
            torch.testing.assert_close(alone[:, :, 0, 0], together[:, :, row, column])


def test_equal_segments_share_the_gradient():
    # the four borders of a checkerboard: all segments of an edge have the same variance
    y = torch.tensor([[1.0, -1.0] * 2, [-1.0, 1.0] * 2] * 2, dtype=torch.float64)[None, None].requires_grad_()
    _, lowest = _Variances.apply(y, 4)
    torch.testing.assert_close(lowest.flatten(), torch.full((4,), 2.0, dtype=torch.float64))
    (slope,) = torch.autograd.grad(lowest[0].sum(), y)
    # each of the three segments (a, b) of the top edge has the slopes a - b and b - a, and gets a third
    expected = torch.tensor([2.0, -4.0, 4.0, -2.0], dtype=torch.float64) / 3
    torch.testing.assert_close(slope[0, 0, 0], expected)
    assert slope[0, 0, 1:].abs().max() == 0


@pytest.mark.parametrize("block", [4, 6, 8])
def test_slopes_of_the_variances(block):
    torch.manual_seed(0)
    y = torch.randn(1, 2, 2 * block, block, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda maps: _Variances.apply(maps, block), y)


def test_block_sizes():
    assert [block_size(stride) for stride in (1, 2, 4, 8, 16)] == [16, 8, 4, 4, 4]
    assert block_size(3) == 4
    assert block_size(2, 32) == 16


@pytest.mark.parametrize("block", [2, 5])
def test_invalid_blocks_are_refused(block):
    with pytest.raises(ValueError, match="even and at least 4"):
        edge_texture_statistics(torch.zeros(1, 1, 8, 8), 1.0, block=block)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 9)])
def test_gradients(size):
    torch.manual_seed(1)
    maps = torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True)
    for block in (4, 6):
        assert gradcheck(lambda x, b=block: edge_texture_statistics(x, 0.1, block=b), maps)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (5, 9), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_flat_maps_give_numbers(size, dtype):
    half_flat = torch.randn(*size)
    half_flat[: (size[0] + 1) // 2] = 0.5
    for flat in (torch.zeros(size), torch.full(size, 0.3), torch.full(size, -7.0), half_flat):
        maps = flat.to(dtype)[None, None].clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            numbers = edge_texture_statistics(maps, 0.1, block=4)
        assert numbers.isfinite().all()
        numbers.sum().backward()
        assert maps.grad.isfinite().all()
        blocks = piqe_blocks(maps.detach())
        assert blocks.variance.isfinite().all()
    assert not piqe_blocks(torch.full((1, 1, *size), 255.0)).active.any()
