"""Tiles: what they cover, and that they make of an image what the network makes of it as a whole."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from torch import Tensor, nn
from torch.nn import functional as F

from kdsr.distill.padding import pad_and_restore
from kdsr.models.self_ensemble import self_ensemble
from kdsr.models.tiling import Span, spans, tile_of, tile_problems, tiled
from kdsr.runtime.errors import OptionError

REACH = (
    6  # LQ pixels to each side that an output of edsr() depends on: five 3×3 layers, and more on finer grids
)


def edsr(scale: int) -> nn.Module:
    torch.manual_seed(scale)
    net = build_network(
        {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": scale,
         "img_range": 1.0}
    )  # fmt: skip
    return net.eval()


class HalfSize(nn.Module):
    """Works at half size, so that it matters where an image is cut."""

    multiple_of = 2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(F.pixel_unshuffle(x, 2)), 2)


def seen_by(net: nn.Module) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    return seen


# -------------------------------------------------------------------------------------------------- the tiles


def test_tiles_by_hand() -> None:
    assert spans(10, 4, 2) == [Span(0, 4, 0, 3), Span(2, 6, 3, 5), Span(4, 8, 5, 7), Span(6, 10, 7, 10)]
    assert spans(4, 4, 2) == spans(4, 9, 2) == [Span(0, 4, 0, 4)]
    # 21 pixels are two tiles, 6 apart at most: there is 1 to spare, which the overlap gets
    assert spans(21, 16, 4) == [Span(0, 16, 0, 10), Span(5, 21, 10, 21)]
    assert spans(32, 12, 4, 8) == [Span(0, 16, 0, 12), Span(8, 24, 12, 20), Span(16, 32, 20, 32)]


@pytest.mark.parametrize(("size", "tile"), product((1, 7, 16, 33, 100), (1, 5, 16, 40)))
def test_tiles_of_one_size_overlap_and_cover_each_pixel_once(size: int, tile: int) -> None:
    for overlap, multiple in product({0, 1, tile // 2, tile - 1} & set(range(tile)), (1, 3, 8)):
        length = -(-size // multiple) * multiple
        found = spans(length, tile, overlap, multiple)
        assert [pixel for span in found for pixel in range(span.first, span.last)] == list(range(length))
        assert len({span.stop - span.start for span in found}) == 1
        assert all(span.start <= span.first < span.last <= span.stop for span in found)
        assert all(span.start % multiple == span.stop % multiple == 0 for span in found)
        for one, other in pairwise(found):
            assert one.stop - other.start >= overlap
            # each keeps half of what they share, so that what is kept lies half the overlap from the edge
            assert one.stop - one.last >= overlap // 2 and other.first - other.start >= overlap // 2
        if multiple == 1:
            fewest = 1 if length <= tile else 1 + -(-(length - tile) // (tile - overlap))
            assert (found[0].stop, len(found)) == (min(tile, length), fewest)


# ------------------------------------------------------------------------------- the same as the whole image


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(70, 41), (24, 25), (1, 60), (61, 1), (5, 7)])
@torch.no_grad()
def test_enough_overlap_gives_the_whole_image_everywhere(scale: int, size: tuple[int, int]) -> None:
    net, lq = edsr(scale), torch.rand(1, 3, *size)
    result = tiled(net, lq, 24, 2 * REACH, scale)
    torch.testing.assert_close(result, net(lq), rtol=0, atol=1e-5)


@torch.no_grad()
def test_little_overlap_gives_it_away_from_the_seams() -> None:
    net, lq = edsr(2), torch.rand(1, 3, 32, 56)
    difference = (tiled(net, lq, 32, 8, 2) - net(lq)).abs().amax((0, 1, 2))
    # tiles from 0 and 24, cut at 28; what lies 6 and more from either's edge is right
    near = torch.zeros(112, dtype=torch.bool)
    near[2 * (32 - REACH) : 2 * (24 + REACH)] = True
    assert difference[~near].max() < 1e-5
    assert difference[near].max() > 1e-4, "else the test does not see seams"


@pytest.mark.parametrize("size", [(40, 40), (37, 53), (1, 45), (2, 3)])
@torch.no_grad()
def test_the_grid_of_the_whole_image_is_kept(size: tuple[int, int]) -> None:
    """A tile from an odd column would be halved on another grid."""
    net, lq = HalfSize(), torch.rand(1, 3, *size)
    for tile, overlap in ((15, 6), (16, 7), (19, 6)):
        result = tiled(net, lq, tile, overlap, 1, 2)
        torch.testing.assert_close(result, pad_and_restore(net, lq, 2, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (8, 8), (9, 31), (40, 2)])
def test_any_size_tile_and_scale(size: tuple[int, int]) -> None:
    lq = torch.rand(2, 3, *size)
    for scale, tile, multiple in product((1, 2, 3, 4), (1, 2, 7, 100), (1, 4)):

        def net(x: Tensor, scale: int = scale, multiple: int = multiple) -> Tensor:
            assert x.is_contiguous() and not any(side % multiple for side in x.shape[-2:])
            return F.interpolate(x, scale_factor=scale)

        result = tiled(net, lq, tile, tile // 2, scale, multiple)
        assert torch.equal(result, F.interpolate(lq, scale_factor=scale)), (scale, tile, multiple)


@torch.no_grad()
def test_an_image_within_a_tile_is_restored_as_without_tiles() -> None:
    net, lq = HalfSize(), torch.rand(1, 3, 19, 30)
    assert torch.equal(tiled(net, lq, 30, 4, 1, 2), pad_and_restore(net, lq, 2, 1))


@pytest.mark.parametrize(
    "network",
    [
        {"type": "SwinIR", "upscale": 2, "img_size": 16, "window_size": 8, "depths": [2], "embed_dim": 8,
         "num_heads": [2], "mlp_ratio": 2, "upsampler": "pixelshuffledirect"},
        {"type": "RLFN", "feature_channels": 8, "num_blocks": 1, "esa_channels": 4, "upscale": 2},
    ],
    ids=lambda network: network["type"],
)  # fmt: skip
@pytest.mark.parametrize("size", [(50, 33), (1, 70), (20, 20)])
@torch.no_grad()
def test_networks_that_see_farther_come_near(network: dict[str, Any], size: tuple[int, int]) -> None:
    """Windows are cut where the whole image has them; RLFN's attention has a grid that depends on the size."""
    torch.manual_seed(0)
    net = build_network(network).eval()
    multiple = network.get("window_size", 1)
    lq = torch.rand(1, 3, *size)
    whole = pad_and_restore(net, lq, multiple, 2)
    seen = seen_by(net)
    result = tiled(net, lq, 28, 12, 2, multiple)
    assert result.shape == whole.shape
    assert len(set(seen)) == 1 and all(side % multiple == 0 for side in seen[0])
    assert (result - whole).abs().mean() < 0.05 * whole.std()


# ------------------------------------------------------------------------------------------------- and the rest


@pytest.mark.parametrize("ensemble", [False, True])
@torch.no_grad()
def test_no_pass_sees_more_than_a_tile(ensemble: bool) -> None:
    net = edsr(1)
    seen = seen_by(net)
    tiled(self_ensemble(net) if ensemble else net, torch.rand(1, 3, 75, 40), 16, 4, 1)
    assert set(seen) == {(16, 16)}
    assert len(seen) == 6 * 3 * (8 if ensemble else 1)


@torch.no_grad()
def test_self_ensemble_within_tiles_is_that_of_the_whole_image() -> None:
    net, lq = edsr(2), torch.rand(1, 3, 45, 30)
    result = tiled(self_ensemble(net), lq, 24, 2 * REACH, 2)
    torch.testing.assert_close(result, self_ensemble(net)(lq), rtol=0, atol=1e-5)


def test_gradients_are_not_kept() -> None:
    assert not tiled(edsr(1), torch.rand(1, 3, 20, 20), 16, 4, 1).requires_grad


def test_what_the_options_ask_for() -> None:
    assert tile_of({}) is tile_of({"tile": None, "tile_overlap": 8}) is None
    assert tile_of({"tile": 256}) == (256, 32)
    assert tile_of({"tile": 21.0, "tile_overlap": None}) == (21, 10)
    assert tile_of({"tile": 1}) == (1, 0)
    assert tile_of({"tile": 48, "tile_overlap": 0}) == (48, 0)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (0, 0, "val.tile: 0 is below 1"),
        (8, -1, "val.tile_overlap: -1 is below 0"),
        (8, 8, r"val.tile_overlap: 8 leaves nothing of tiles of 8 \(val.tile\)"),
    ],
)
def test_wrong_tiles_are_refused(tile: int, overlap: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tiled(nn.Identity(), torch.rand(1, 3, 9, 9), tile, overlap, 1)
    with pytest.raises(OptionError, match=message):
        tile_of({"tile": tile, "tile_overlap": overlap})
    assert len(tile_problems({"tile": tile, "tile_overlap": overlap})) == 1
    assert len(tile_problems({"tile": "x", "tile_overlap": [3]})) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_tiles_of_a_gpu_are_gathered_on_the_cpu() -> None:
    net, lq = edsr(2).cuda(), torch.rand(1, 3, 50, 70, device="cuda")
    result = tiled(net, lq, 24, 2 * REACH, 2)
    assert result.device.type == "cpu"
    torch.testing.assert_close(result, net(lq).cpu(), rtol=0, atol=1e-4)
