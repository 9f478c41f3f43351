"""Restormer (Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration", CVPR 2022,
arXiv 2111.09881).

A U-Net of transformer blocks whose attention is between channels, so that its cost grows with the number of pixels and
not with its square. Written from the paper; parameter names are those of the published weights, which load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from kdsr.archs.image_size import require_multiple
from kdsr.runtime.errors import OptionError

_EPS = 1e-5
_LAYER_NORMS = ("WithBias", "BiasFree")


class WithBias(nn.Module):
    """Layer normalisation over the channels of each pixel, (N, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # With channels last in memory, as Restormer lays its features out, neither permutation moves anything.
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, _EPS)
        return y.permute(0, 3, 1, 2)


class BiasFree(nn.Module):
    """As WithBias without shifts: the deviation is divided by, the mean stays; (N, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        variance = rows.var(-1, correction=0, keepdim=True)
        return (rows * torch.rsqrt(variance + _EPS) * self.weight).permute(0, 3, 1, 2)


class LayerNorm(nn.Module):
    """One of the two kinds, under the name that it has in the published weights."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.body = BiasFree(channels) if kind == "BiasFree" else WithBias(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Attention(nn.Module):
    """MDTA, attention between channels (Equation 1), (N, C, H, W) -> same.

    Args:
        channels: C, a multiple of ``heads``.
        heads: Groups of channels that attend among themselves, each with a learned temperature.
        bias: Whether the convolutions have one.
    """

    def __init__(self, channels: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # (N, 3C, H, W) -> q, k, v of (N, heads, C / heads, H * W)
        q, k, v = self.qkv_dwconv(self.qkv(x)).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)
        # Rows of q and k have unit length. Dividing their small product by the lengths is the same at less cost.
        lengths = _lengths(q) @ _lengths(k).transpose(-2, -1)
        attention = torch.softmax(q @ k.transpose(-2, -1) / lengths * self.temperature, dim=-1)
        return self.project_out((attention @ v).reshape(x.shape))


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-12)


class FeedForward(nn.Module):
    """GDFN, a feed-forward network with a gate (Equation 2), (N, C, H, W) -> same.

    Args:
        channels: C.
        expansion: Width inside, relative to C.
        bias: Whether the convolutions have one.
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
    """norm, attention, norm, feed-forward, each pair beside a skip, (N, C, H, W) -> same."""

    def __init__(self, channels: int, heads: int, expansion: float, bias: bool, layer_norm: str) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels, layer_norm)
        self.attn = Attention(channels, heads, bias)
        self.norm2 = LayerNorm(channels, layer_norm)
        self.ffn = FeedForward(channels, expansion, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class PatchEmbed(nn.Module):
    """The first convolution, (N, inp_channels, H, W) -> (N, dim, H, W)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            in_channels, channels, 3, padding=1, bias=False
        )  # as in the weights, whatever bias says

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Resample(nn.Module):
    """(N, C, H, W) -> (N, 2C, H/2, W/2), or with ``up`` -> (N, C/2, 2H, 2W)."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        wide = channels * 2 if up else channels // 2
        shuffle = nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2)
        self.body = nn.Sequential(nn.Conv2d(channels, wide, 3, padding=1, bias=False), shuffle)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@ARCH_REGISTRY.register()
class Restormer(nn.Module):
    """Restoration of (N, inp_channels, H, W) in [0, 1] to (N, out_channels, H, W), about [0, 1].

    The input is added to the output, but for ``dual_pixel_task``. H and W must be multiples of 8 (validation pads).

    Args:
        inp_channels: Channels of the input.
        out_channels: Channels of the output.
        dim: Channels of the first level; doubled per level.
        num_blocks: Blocks of the four levels, down and (but for the last) up again.
        num_refinement_blocks: Blocks at full size after that.
        heads: Heads of the four levels.
        ffn_expansion_factor: Width inside the feed-forward networks, relative to the level's.
        bias: Whether the convolutions have biases.
        LayerNorm_type: ``WithBias``, or ``BiasFree`` (the paper's networks for denoising).
        dual_pixel_task: Defocus deblurring of two views (6 channels in, 3 out): a skip of features instead of the
            image's.

    Raises:
        OptionError: From the constructor, when numbers do not go together.
        DataError: From ``forward``, when H or W is no multiple of 8.
    """

    multiple_of = 8

    def __init__(
        self,
        inp_channels: int = 3,
        out_channels: int = 3,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        bias: bool = False,
        LayerNorm_type: str = "WithBias",  # noqa: N803  the authors' name
        dual_pixel_task: bool = False,
    ) -> None:
        super().__init__()
        given = {
            "inp_channels": inp_channels,
            "out_channels": out_channels,
            "dim": dim,
            "num_blocks": num_blocks,
            "num_refinement_blocks": num_refinement_blocks,
            "heads": heads,
            "ffn_expansion_factor": ffn_expansion_factor,
            "LayerNorm_type": LayerNorm_type,
            "dual_pixel_task": dual_pixel_task,
        }
        if problems := self.option_problems(given):
            raise OptionError([f"Restormer: {problem}" for problem in problems])

        def level(index: int, channels: int, number: int) -> nn.Sequential:
            shape = (channels, heads[index], ffn_expansion_factor, bias, LayerNorm_type)
            return nn.Sequential(*(TransformerBlock(*shape) for _ in range(number)))

        self.patch_embed = PatchEmbed(inp_channels, dim)
        self.encoder_level1 = level(0, dim, num_blocks[0])
        self.down1_2 = Resample(dim, up=False)
        self.encoder_level2 = level(1, 2 * dim, num_blocks[1])
        self.down2_3 = Resample(2 * dim, up=False)
        self.encoder_level3 = level(2, 4 * dim, num_blocks[2])
        self.down3_4 = Resample(4 * dim, up=False)
        self.latent = level(3, 8 * dim, num_blocks[3])
        self.up4_3 = Resample(8 * dim, up=True)
        self.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=bias)
        self.decoder_level3 = level(2, 4 * dim, num_blocks[2])
        self.up3_2 = Resample(4 * dim, up=True)
        self.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=bias)
        self.decoder_level2 = level(1, 2 * dim, num_blocks[1])
        self.up2_1 = Resample(
            2 * dim, up=True
        )  # joined without reduction: level 1 is 2 * dim wide on the way up
        self.decoder_level1 = level(0, 2 * dim, num_blocks[0])
        self.refinement = level(0, 2 * dim, num_refinement_blocks)
        self.dual_pixel_task = dual_pixel_task
        if dual_pixel_task:
            self.skip_conv = nn.Conv2d(dim, 2 * dim, 1, bias=bias)
        self.output = nn.Conv2d(2 * dim, out_channels, 3, padding=1, bias=bias)

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """What the constructor's signature cannot tell about its options; empty when it can be built."""
        found = []
        dim = options.get("dim", 48)
        for key, lowest in (
            ("inp_channels", 1),
            ("out_channels", 1),
            ("dim", 1),
            ("num_refinement_blocks", 0),
        ):
            if isinstance(options.get(key), int) and options[key] < lowest:
                found.append(f"{key}: must be at least {lowest}, not {options[key]}")
        for key, lowest in (("num_blocks", 0), ("heads", 1)):
            numbers = options.get(key)
            if isinstance(numbers, list | tuple) and (
                len(numbers) != 4
                or any(
                    isinstance(number, bool) or not isinstance(number, int) or number < lowest
                    for number in numbers
                )
            ):
                found.append(f"{key}: must be four whole numbers of at least {lowest}, not {list(numbers)}")
        kind = options.get("LayerNorm_type", "WithBias")
        if isinstance(kind, str) and kind not in _LAYER_NORMS:
            found.append(f"LayerNorm_type: {kind!r} is neither {' nor '.join(_LAYER_NORMS)}")
        if found or not isinstance(dim, int):
            return found
        if dim % 2:
            found.append(f"dim: must be even, not {dim}")
        heads = options.get("heads", (1, 2, 4, 8))
        if isinstance(heads, list | tuple):
            # level 1 is dim wide on the way down and 2 * dim on the way up, with the same heads
            odd = [str(number) for index, number in enumerate(heads) if dim * 2**index % number]
            if odd:
                found.append(
                    f"heads: {', '.join(odd)} does not divide the channels of its level (dim {dim}, doubled per level)"
                )
        expansion = options.get("ffn_expansion_factor", 2.66)
        if isinstance(expansion, int | float) and int(dim * expansion) < 1:
            found.append(f"ffn_expansion_factor: {expansion} leaves no channel")
        images = (options.get("inp_channels", 3), options.get("out_channels", 3))
        if not options.get("dual_pixel_task") and images[0] != images[1]:
            found.append(
                f"out_channels: is {images[1]}, but the {images[0]} channels of the input are added to the output"
            )
        return found

    def forward(self, x: Tensor) -> Tensor:
        require_multiple(x, self.multiple_of, "Restormer")
        embedded = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        level1 = self.encoder_level1(embedded)
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        h = self.latent(self.down3_4(level3))
        h = self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3(h), level3], 1)))
        h = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(h), level2], 1)))
        h = self.refinement(self.decoder_level1(torch.cat([self.up2_1(h), level1], 1)))
        if self.dual_pixel_task:
            return self.output(h + self.skip_conv(embedded))
        return self.output(h) + x
