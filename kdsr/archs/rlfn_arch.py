"""RLFN, the Residual Local Feature Network (Kong et al., CVPR workshops 2022, arXiv 2205.07514).

Written from the paper; the published weights load strictly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

# The attention applies 7x7 max pooling after a 3x3 convolution with stride 2, without padding.
_MINIMUM_SIZE = 15


class SpatialAttention(nn.Module):
    """Enhanced spatial attention from downsampled features, (N, C, H, W) -> same.

    Args:
        channels: Channels of the features.
        hidden: Hidden channels.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.conv_f = nn.Conv2d(hidden, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=2)
        self.conv3 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.conv4 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.conv1(x)
        coarse = F.max_pool2d(self.conv2(fine), kernel_size=7, stride=3)
        coarse = F.interpolate(self.conv3(coarse), size=x.shape[2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.conv4(coarse + self.conv_f(fine)))


class LocalFeatureBlock(nn.Module):
    """RLFB: three convolutions with a skip connection, a 1x1 convolution and attention, (N, C, H, W) -> same."""

    def __init__(self, channels: int, esa_channels: int) -> None:
        super().__init__()
        self.c1_r = nn.Conv2d(channels, channels, 3, padding=1)
        self.c2_r = nn.Conv2d(channels, channels, 3, padding=1)
        self.c3_r = nn.Conv2d(channels, channels, 3, padding=1)
        self.c5 = nn.Conv2d(channels, channels, 1)
        self.esa = SpatialAttention(channels, esa_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for conv in (self.c1_r, self.c2_r, self.c3_r):
            out = F.leaky_relu(conv(out), 0.05)
        return self.esa(self.c5(out + x))


@ARCH_REGISTRY.register()
class RLFN(nn.Module):
    """Super-resolution of (N, C, H, W) in [0, 1] to (N, C, H * upscale, W * upscale), about [0, 1].

    H and W are arbitrary: images below 15 pixels are padded for the attention, and cropped again.

    Args:
        in_channels: Channels of the input image.
        out_channels: Channels of the output image.
        feature_channels: Width: 52 in RLFN, 48 in RLFN-S.
        num_blocks: Number of blocks: 6 in both.
        esa_channels: Hidden width of the attention.
        upscale: Scale factor.
        img_range: Factor applied to the input. The published weights were trained on [0, 255].
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        feature_channels: int = 52,
        num_blocks: int = 6,
        esa_channels: int = 16,
        upscale: int = 4,
        img_range: float = 255.0,
    ) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.upscale = upscale
        self.img_range = img_range
        self.conv_1 = nn.Conv2d(in_channels, feature_channels, 3, padding=1)
        for index in range(1, num_blocks + 1):  # numbered as in the published weights
            self.add_module(f"block_{index}", LocalFeatureBlock(feature_channels, esa_channels))
        self.conv_2 = nn.Conv2d(feature_channels, feature_channels, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(feature_channels, out_channels * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        missing = [max(0, _MINIMUM_SIZE - size) for size in (width, height)]
        if any(missing):
            x = F.pad(x, (0, missing[0], 0, missing[1]), mode="replicate")
        shallow = self.conv_1(x * self.img_range)
        deep = shallow
        for index in range(1, self.num_blocks + 1):
            deep = getattr(self, f"block_{index}")(deep)
        out = self.upsampler(self.conv_2(deep) + shallow) / self.img_range
        return out[..., : height * self.upscale, : width * self.upscale]
