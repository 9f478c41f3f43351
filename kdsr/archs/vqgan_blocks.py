"""Encoder and decoder of a VQGAN, with the parameter names and the arithmetic of taming-transformers.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021 (arXiv 2012.09841).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.archs.arch_checks import is_whole
from kdsr.runtime.suggestions import nearest


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


@dataclass(frozen=True)
class DDConfig:
    """taming-transformers' ``ddconfig``: the shape of encoder and decoder.

    Args:
        ch: Width of the first level; level i has ``ch * ch_mult[i]`` channels.
        ch_mult: One factor per level; the image is halved between levels.
        num_res_blocks: Residual blocks per level of the encoder (the decoder has one more).
        z_channels: Channels of the encoding before ``quant_conv``.
        resolution: Side of the images it was designed for: says with ``attn_resolutions`` which levels have
            attention. Images of other sizes are welcome.
        attn_resolutions: Sides of the feature maps with attention.
        in_channels: Channels of the image.
        out_ch: Channels of the reconstruction.
        dropout: Dropout rate in the residual blocks.
        double_z: Must be false (a KL autoencoder's option).
        norm_groups: Groups of the normalisation, 32 in taming-transformers. A network of 32 channels needs fewer:
            with one channel per group the mean of every channel is lost, and with it the image's brightness.
    """

    ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    z_channels: int
    resolution: int
    attn_resolutions: Sequence[int] = field(default_factory=list)
    in_channels: int = 3
    out_ch: int = 3
    dropout: float = 0.0
    double_z: bool = False
    norm_groups: int = 32

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.ch * factor for factor in self.ch_mult]

    def attention(self, level: int) -> bool:
        """Whether a level has attention: by ``resolution``, not by the image's size."""
        return self.resolution // 2**level in self.attn_resolutions

    @classmethod
    def problems(cls, options: Mapping[str, Any]) -> list[str]:
        """All that is wrong with a ``ddconfig`` of an option file, one line each."""
        known = [entry.name for entry in fields(cls)]
        required = known[: known.index("attn_resolutions")]
        found = [f"ddconfig.{key}: no such key; {nearest(key, known)}" for key in options if key not in known]
        found += [f"ddconfig.{key}: missing" for key in required if key not in options]
        lists = ("ch_mult", "attn_resolutions")
        for key in lists:
            if not is_whole(options.get(key, [])):
                found.append(f"ddconfig.{key}: is a list of whole numbers")
        numbers = [key for key in known if key not in {*lists, "dropout", "double_z"}]
        for key in numbers:
            if not is_whole([options.get(key, 1)]):
                found.append(f"ddconfig.{key}: is a whole number")
        if found:
            return found
        found += [f"ddconfig.{key}: must be at least 1" for key in numbers if options.get(key, 1) < 1]
        for key in lists:
            if min(options.get(key) or [1]) < 1:
                found.append(f"ddconfig.{key}: its numbers must be at least 1")
        dropout = options.get("dropout", 0.0)
        if not is_number(dropout) or not 0 <= dropout < 1:
            found.append(f"ddconfig.dropout: is a rate from 0 to below 1, not {dropout!r}")
        if found:
            return found
        if options.get("double_z"):
            found.append("ddconfig.double_z: must be false, a VQGAN has codes and no variances")
        if not options["ch_mult"]:
            found.append("ddconfig.ch_mult: needs at least one level")
        groups = options.get("norm_groups", cls.norm_groups)
        for width in sorted({options["ch"], *(options["ch"] * factor for factor in options["ch_mult"])}):
            if width % groups:
                found.append(
                    f"ddconfig: ch and every ch * ch_mult must be a multiple of {groups}, not {width}"
                )
        return found


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalisation and swish; in place where no gradient needs the input of swish."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


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
        h = self.conv1(_normalised(self.norm1, x))
        h = self.conv2(self.dropout(_normalised(self.norm2, h)))
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


def _downsample(channels: int) -> nn.Module:
    """Halves height and width (rounding down): one row and column of zeros below and right, then stride 2."""
    return nn.Sequential(
        OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))
    )


def _upsample(channels: int) -> nn.Module:
    """Doubles height and width: nearest neighbour, then a convolution."""
    return nn.Sequential(
        OrderedDict(
            nearest=nn.UpsamplingNearest2d(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1)
        )
    )


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
        self.downsample = _downsample(channels) if downsample else None
        self.upsample = _upsample(channels) if upsample else None

    def forward(self, h: Tensor) -> Tensor:
        return self.rest(self.block[0](h))

    def rest(self, h: Tensor) -> Tensor:
        """The level's output, given that of its first residual block."""
        for index, block in enumerate(self.block):
            if index > 0:
                h = block(h)
            if len(self.attn) > 0:
                h = self.attn[index](h)
        if self.downsample is not None:
            h = self.downsample(h)
        if self.upsample is not None:
            h = self.upsample(h)
        return h


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, dropout, groups)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Features of images (N, in_channels, H, W) per level, and from them the encoding; f = 2 ** (levels - 1)."""

    def __init__(self, config: DDConfig) -> None:
        super().__init__()
        widths, shape = config.widths, (config.dropout, config.norm_groups)
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        befores, last = [config.ch, *widths], len(widths) - 1
        self.down = nn.ModuleList(
            Level(befores[i], width, config.num_res_blocks, config.attention(i), *shape, downsample=i < last)
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], *shape)
        self.norm_out = _norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor, levels: int | None = None) -> list[Tensor]:
        """The output of each level's first residual block, of all levels or the first ones."""
        first = cast(Level, self.down[0])
        return self._further([first.block[0](self.conv_in(x))], levels)

    def _further(self, features: Sequence[Tensor], levels: int | None = None) -> list[Tensor]:
        found = [*features]
        for above, level in pairwise(cast(list[Level], [*self.down])[len(found) - 1 : levels]):
            found.append(level.block[0](above.rest(found[-1])))
        return found

    def encoding(self, features: Sequence[Tensor]) -> Tensor:
        """(N, z_channels, H / f, W / f), given the features of all levels or the first ones."""
        h = cast(Level, self.down[-1]).rest(self._further(features)[-1])
        return self.conv_out(_normalised(self.norm_out, self.mid(h)))


class Decoder(nn.Module):
    """(N, z_channels, h, w) -> (N, out_ch, h * f, w * f); one residual block per level more than the encoder.

    Its levels are indexed as the encoder's: 0 is the full resolution.
    """

    def __init__(self, config: DDConfig) -> None:
        super().__init__()
        widths, shape = config.widths, (config.dropout, config.norm_groups)
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], *shape)
        befores = [*widths[1:], widths[-1]]  # a level's input is the output of the next lower resolution
        self.up = nn.ModuleList(
            Level(befores[i], width, config.num_res_blocks + 1, config.attention(i), *shape, upsample=i > 0)
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[0], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(_normalised(self.norm_out, h))
