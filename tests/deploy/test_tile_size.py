"""The estimate of a network's memory, and the tiles that it leads to."""

from __future__ import annotations

import pytest
import torch
from basicsr.archs import build_network
from torch import nn

from kdsr.deploy.inference import Inference, Settings, at_least
from kdsr.deploy.network_file import OpenedNetwork
from kdsr.deploy.tile_size import bytes_per_pixel, fitting_tile
from kdsr.models.restorer import Restorer
from kdsr.runtime.errors import DataError, OptionError

CPU = torch.device("cpu")


class TwoLayers(nn.Module):
    """4 channels and then 2, both in memory at the end of the second convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_all_tensors_that_are_alive_at_once_are_counted() -> None:
    restorer = Restorer({"scale": 1, "val": {}})
    assert bytes_per_pixel(restorer, TwoLayers(), 3, CPU) == 4 * (4 + 2)  # the input is the caller's


def test_memory_grows_with_the_area_of_a_real_network() -> None:
    """What the small image tells of a four times larger one."""
    restorer = Restorer({"scale": 4, "val": {}})
    for options in (
        {"type": "RCAN", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 16, "num_group": 1, "num_block": 1, "upscale": 4},
        {"type": "SwinIR", "upscale": 4, "img_size": 64, "window_size": 8, "depths": [2], "num_heads": [2],
         "embed_dim": 16, "mlp_ratio": 2, "upsampler": "pixelshuffledirect"},
    ):  # fmt: skip
        net = build_network(options).eval()
        small = bytes_per_pixel(restorer, net, 3, CPU)
        import kdsr.deploy.tile_size as module

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(module, "PROBE", 128)
            assert bytes_per_pixel(restorer, net, 3, CPU) == pytest.approx(small, rel=0.15)


@pytest.mark.parametrize(
    ("free", "tile"),
    [(None, None), (2 * 10**6 * 100, None), (2 * 640**2 * 100, 640), (2 * 700**2 * 100, 672), (1, 64)],
)
def test_the_largest_tile_that_fits_into_half_of_the_free_memory(free: int | None, tile: int | None) -> None:
    assert fitting_tile(1000, 1000, 100, free) == tile


class Greedy(nn.Module):
    """Repeats pixels; no more than ``most`` of them fit into its memory."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.sizes = most, []
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(x.shape[-2:]))
        if x.shape[-1] * x.shape[-2] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (x * self.weight).repeat_interleave(2, -1).repeat_interleave(2, -2)


def opened(net: nn.Module, scale: int = 2, channels: int = 3) -> OpenedNetwork:
    return OpenedNetwork(net, None, scale, 1, channels, channels, "a network")


def test_tiles_are_halved_until_they_fit_and_stay_so() -> None:
    net = Greedy(100**2)
    inference = Inference(opened(net), Settings())
    image = torch.rand(1, 3, 210, 300)
    wanted = image.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.equal(inference(image), wanted)
    assert inference.largest == 75
    net.sizes.clear()
    assert torch.equal(inference(image), wanted)
    assert max(map(max, net.sizes)) <= 75


@pytest.mark.parametrize("tile", [None, 128])
def test_what_does_not_fit_at_all_is_an_error(tile: int | None) -> None:
    inference = Inference(opened(Greedy(100)), Settings(tile=tile))
    with pytest.raises(DataError, match="300x210 pixels do not fit into memory"):
        inference(torch.rand(1, 3, 210, 300))


class Fixed(nn.Module):
    """Takes images of one size only, as an exported file may."""

    fixed_size = (64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-2:] == (64, 64)
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize("size", [(64, 64), (10, 7), (65, 200), (20, 100)])
def test_a_network_for_one_size_gets_tiles_of_it(size: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *size)
    result = Inference(opened(Fixed()), Settings())(image)
    assert torch.equal(result, image.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_a_tile_of_another_size_is_refused() -> None:
    with pytest.raises(OptionError, match="takes images of 64x64 pixels only; omit --tile"):
        Inference(opened(Fixed()), Settings(tile=32))


def test_networks_that_take_no_pictures_are_refused() -> None:
    with pytest.raises(OptionError, match="maps 4 channels to 4"):
        Inference(opened(Greedy(1), channels=4), Settings())


def test_small_images_are_mirrored_and_large_ones_kept() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)
    grown = at_least(image, 4)
    assert grown.shape == (1, 1, 4, 4) and torch.equal(grown[..., 3, :], image[..., 1, :])
    assert torch.equal(at_least(image, 2), image)
