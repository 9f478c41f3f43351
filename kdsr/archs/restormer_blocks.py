"""Blocks of Restormer (arXiv 2111.09881), with the parameter names of the published weights."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.archs.nafnet_arch import LayerNorm2d

_EPS = 1e-5


class BiasFree(nn.Module):
    """Divides by the standard deviation without subtracting the mean, (N, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        variance = rows.var(-1, correction=0, keepdim=True)
        return (rows * torch.rsqrt(variance + _EPS) * self.weight).permute(0, 3, 1, 2)


def layer_norm(channels: int, kind: str) -> nn.Module:
    """Either kind, with the parameter name of the published weights."""
    norm = BiasFree(channels) if kind == "BiasFree" else LayerNorm2d(channels, _EPS)
    return nn.Sequential(OrderedDict(body=norm))


class Attention(nn.Module):
    """MDTA, attention between channels (Equation 1), (N, C, H, W) -> same.

    Args:
        channels: C, a multiple of ``heads``.
        heads: Attention heads, each with a learned temperature.
        bias: Whether the convolutions have biases.
    """

    def __init__(self, channels: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        # (N, 3C, H, W), channels-last -> q, k, v of (N, heads, H * W, C / heads)
        rows = self.qkv_dwconv(self.qkv(x)).permute(0, 2, 3, 1).reshape(n, h * w, 3, self.heads, -1)
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)
        # Normalises q and k: dividing their small product by the norms is cheaper.
        norms = _norms(q).unsqueeze(-1) * _norms(k).unsqueeze(-2)
        attention = torch.softmax(q.transpose(-2, -1) @ k / norms * self.temperature, dim=-1)
        out = v @ attention.transpose(-2, -1)
        return self.project_out(out.transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2))


def _norms(channels: Tensor) -> Tensor:
    """(..., H * W, C) -> (..., C)."""
    return torch.linalg.vector_norm(channels, dim=-2).clamp_min(1e-12)


class FeedForward(nn.Module):
    """GDFN, a gated feed-forward network (Equation 2), (N, C, H, W) -> same.

    Args:
        channels: C.
        expansion: Hidden width, relative to C.
        bias: Whether the convolutions have biases.
    """

    def __init__(self, channels: int, expansion: float, bias: bool) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=bias)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=bias)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """Norm and attention, norm and feed-forward, each with a skip connection, (N, C, H, W) -> same."""

    def __init__(self, channels: int, heads: int, expansion: float, bias: bool, norm: str) -> None:
        super().__init__()
        self.norm1 = layer_norm(channels, norm)
        self.attn = Attention(channels, heads, bias)
        self.norm2 = layer_norm(channels, norm)
        self.ffn = FeedForward(channels, expansion, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def patch_embed(in_channels: int, channels: int) -> nn.Module:
    """The first convolution, without bias as in the published weights, regardless of the option."""
    return nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)))


def resample(channels: int, up: bool) -> nn.Module:
    """(N, C, H, W) -> (N, 2C, H/2, W/2), or with ``up`` -> (N, C/2, 2H, 2W)."""
    wide = channels * 2 if up else channels // 2
    shuffle = nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2)
    conv = nn.Conv2d(channels, wide, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(body=nn.Sequential(conv, shuffle)))
