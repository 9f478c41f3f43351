"""Encoder and decoder of a VQGAN, with the parameter names and the arithmetic of taming-transformers.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021 (arXiv 2012.09841).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """norm, swish, conv, norm, swish, (dropout,) conv, beside a skip that is 1x1 where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a skip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # (N, C, H, W) -> (N, 1 head, H*W, C); the scale 1/sqrt(C) is the function's own
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halves height and width (rounding down): one row and column of zeros below and right, then stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, attention after each where it has it; then the next size."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        attention: bool,
        dropout: float,
        groups: int,
        *,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(width, channels, dropout, groups) for width in widths)
        self.attn = nn.ModuleList(Attention(channels, groups) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(channels) if downsample else None
        self.upsample = Upsample(channels) if upsample else None

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the level's output and that of its first residual block, before attention."""
        first = h
        for index, block in enumerate(self.block):
            h = block(h)
            if index == 0:
                first = h
            if len(self.attn) > 0:
                h = self.attn[index](h)
        if self.downsample is not None:
            h = self.downsample(h)
        if self.upsample is not None:
            h = self.upsample(h)
        return h, first


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, dropout, groups)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


def level_has_attention(resolution: int, levels: int, attn_resolutions: Sequence[int]) -> list[bool]:
    """Which levels have attention: by the resolution the network is configured for, not by the image's size.

    Args:
        resolution: Side of the images that the network was designed for.
        levels: Number of resolutions, each half the one before.
        attn_resolutions: Sides of the feature maps that get attention.
    """
    return [resolution // 2**level in attn_resolutions for level in range(levels)]


class Encoder(nn.Module):
    """(N, in_channels, H, W) -> (N, z_channels, H / f, W / f), with f = 2 ** (levels - 1)."""

    def __init__(
        self,
        *,
        in_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention: Sequence[bool],
        dropout: float,
        z_channels: int,
        norm_groups: int,
    ) -> None:
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                before, width, num_res_blocks, has, dropout, norm_groups, downsample=index < len(widths) - 1
            )
            for index, (before, width, has) in enumerate(zip([ch, *widths], widths, attention, strict=False))
        )
        self.mid = Middle(widths[-1], dropout, norm_groups)
        self.norm_out = _norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gives the encoding and, per level, the output of its first residual block."""
        features = []
        h = self.conv_in(x)
        for level in self.down:
            h, first = level(h)
            features.append(first)
        return self.conv_out(F.silu(self.norm_out(self.mid(h)))), features


class Decoder(nn.Module):
    """(N, z_channels, h, w) -> (N, out_ch, h * f, w * f); one residual block per level more than the encoder.

    Its levels are indexed as the encoder's: 0 is the full resolution.
    """

    def __init__(
        self,
        *,
        out_ch: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention: Sequence[bool],
        dropout: float,
        z_channels: int,
        norm_groups: int,
    ) -> None:
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout, norm_groups)
        befores = [*widths[1:], widths[-1]]  # a level's input is the output of the next lower resolution
        self.up = nn.ModuleList(
            Level(before, width, num_res_blocks + 1, has, dropout, norm_groups, upsample=index > 0)
            for index, (before, width, has) in enumerate(zip(befores, widths, attention, strict=True))
        )
        self.norm_out = _norm(widths[0], norm_groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h, _ = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
