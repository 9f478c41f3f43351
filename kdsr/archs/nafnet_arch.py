"""NAFNet (Chen et al., "Simple Baselines for Image Restoration", ECCV 2022, arXiv 2204.04676).

A U-Net of blocks with gates (products of two halves) instead of activation functions. Written from the paper; the
published weights load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from kdsr.archs.arch_checks import is_whole, minimum_problems, require_multiple
from kdsr.runtime.errors import OptionError


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of each pixel, (N, C, H, W) -> same."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # NAFNet's and Restormer's features are channels-last, so that the permutations do not copy.
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class SimpleGate(nn.Module):
    """Product of the two halves of the channels, (N, 2C, H, W) -> (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return first * second


class NAFBlock(nn.Module):
    """Two residual branches, (N, C, H, W) -> same; initially the identity, because ``beta`` and ``gamma`` are 0.

    1. norm, 1x1 and depthwise 3x3 convolution, gate, channel attention, 1x1 convolution (Figure 3e)
    2. norm, 1x1 convolution, gate, 1x1 convolution
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.conv1 = nn.Conv2d(channels, wide, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))
        self.sg = SimpleGate()
        self.conv4 = nn.Conv2d(channels, wide, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.norm1 = LayerNorm2d(channels)
        self.norm2 = LayerNorm2d(channels)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.sg(self.conv2(self.conv1(self.norm1(x))))
        y = torch.addcmul(x, self.conv3(h * self.sca(h)), self.beta)
        return torch.addcmul(y, self.conv5(self.sg(self.conv4(self.norm2(y)))), self.gamma)


@ARCH_REGISTRY.register()
class NAFNet(nn.Module):
    """Restoration of (N, C, H, W) in [0, 1] to the same size, about [0, 1]; the input is added to the output.

    Each level halves H and W and doubles the channels: H and W must be multiples of ``multiple_of``,
    2 ** number of levels (validation pads).

    Args:
        img_channel: Channels of input and output.
        width: Channels of the first level.
        middle_blk_num: Blocks of the bottleneck.
        enc_blk_nums: Blocks of each encoder level, finest first.
        dec_blk_nums: Blocks of each decoder level, coarsest first.

    Raises:
        OptionError: The lists have different lengths, or a number is too small.
        DataError: H or W is not such a multiple.
    """

    def __init__(
        self,
        img_channel: int = 3,
        width: int = 16,
        middle_blk_num: int = 1,
        enc_blk_nums: Sequence[int] = (),
        dec_blk_nums: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if problems := self.option_problems(locals()):
            raise OptionError([f"NAFNet: {problem}" for problem in problems])
        self.intro = nn.Conv2d(img_channel, width, 3, padding=1)
        self.ending = nn.Conv2d(width, img_channel, 3, padding=1)
        self.encoders = nn.ModuleList()
        self.decoders = nn.ModuleList()
        self.ups = nn.ModuleList()
        self.downs = nn.ModuleList()
        channels = width
        for number in enc_blk_nums:
            self.encoders.append(_blocks(channels, number))
            self.downs.append(nn.Conv2d(channels, 2 * channels, 2, stride=2))
            channels *= 2
        self.middle_blks = _blocks(channels, middle_blk_num)
        for number in dec_blk_nums:
            self.ups.append(
                nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.PixelShuffle(2))
            )
            channels //= 2
            self.decoders.append(_blocks(channels, number))
        self.multiple_of = 2 ** len(self.encoders)

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """Problems of the constructor's options that its signature does not show."""
        found = minimum_problems(options, img_channel=1, width=1, middle_blk_num=0)
        down, up = options.get("enc_blk_nums", ()), options.get("dec_blk_nums", ())
        for key, numbers in (("enc_blk_nums", down), ("dec_blk_nums", up)):
            if not isinstance(numbers, list | tuple):
                return found  # the type check reports it
            if not is_whole(numbers, 0):
                found.append(f"{key}: must be whole numbers of at least 0, not {list(numbers)}")
        if len(down) != len(up):
            found.append(f"dec_blk_nums: has {len(up)} levels, but enc_blk_nums has {len(down)}")
        return found

    def forward(self, x: Tensor) -> Tensor:
        require_multiple(x, self.multiple_of, "NAFNet")
        h = self.intro(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            h = encoder(h)
            skips.append(h)
            h = down(h)
        h = self.middle_blks(h)
        for decoder, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            h = decoder(up(h) + skip)
        return self.ending(h) + x


class LocalAverage(nn.Module):
    """Mean of a window around each pixel, (N, C, H, W) -> same; (N, C, 1, 1) if the window covers the image.

    Near the border the nearest window inside the image is used.

    Args:
        size: Height and width of the window, limited to the image's.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.size[0] >= height and self.size[1] >= width:
            return x.mean((2, 3), keepdim=True)
        for dim, window in ((2, self.size[0]), (3, self.size[1])):
            x = _windows(x, min(window, x.shape[dim]), dim)
        down, right = height - x.shape[2], width - x.shape[3]
        return F.pad(x, (right // 2, (right + 1) // 2, down // 2, (down + 1) // 2), mode="replicate")


def _windows(x: Tensor, window: int, dim: int) -> Tensor:
    """Means of all windows along one dimension, by differences of cumulative sums."""
    sums = F.pad(x.cumsum(dim), (1, 0, 0, 0) if dim == 3 else (0, 0, 1, 0))
    length = x.shape[dim] - window + 1
    return (sums.narrow(dim, window, length) - sums.narrow(dim, 0, length)) / window


@ARCH_REGISTRY.register()
class NAFNetLocal(NAFNet):
    """NAFNet with local statistics (TLC: Chu et al., ECCV 2022, arXiv 2112.04491), as its authors test it.

    The channel attention uses means of windows of 1.5 times the training patch instead of means of the whole image. Up
    to that size it equals NAFNet; the weights and the other arguments are NAFNet's.

    Args:
        train_size: Shape of the training batch; only its last two numbers (height, width) are used.
    """

    def __init__(
        self,
        img_channel: int = 3,
        width: int = 16,
        middle_blk_num: int = 1,
        enc_blk_nums: Sequence[int] = (),
        dec_blk_nums: Sequence[int] = (),
        train_size: Sequence[int] = (1, 3, 256, 256),
    ) -> None:
        super().__init__(img_channel, width, middle_blk_num, enc_blk_nums, dec_blk_nums)
        if problems := self.option_problems({"train_size": train_size}):
            raise OptionError([f"NAFNetLocal: {problem}" for problem in problems])
        height, wide = (int(1.5 * size) for size in train_size[-2:])
        levels = [*self.encoders, self.middle_blks, *self.decoders]
        depths = [*range(len(self.encoders) + 1), *reversed(range(len(self.decoders)))]
        for level, depth in zip(levels, depths, strict=True):
            for block in level:
                block.sca[0] = LocalAverage((max(1, height >> depth), max(1, wide >> depth)))

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """Problems of the constructor's options that its signature does not show."""
        found = super().option_problems(options)
        size = options.get("train_size", (1, 3, 256, 256))
        if isinstance(size, list | tuple) and not (len(size) > 1 and is_whole(size[-2:], 1)):
            found.append(f"train_size: must end in the height and width of a patch, not {list(size)}")
        return found


def _blocks(channels: int, number: int) -> nn.Sequential:
    return nn.Sequential(*(NAFBlock(channels) for _ in range(number)))
