"""Restormer (Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration", CVPR 2022,
arXiv 2111.09881).

A U-Net of transformer blocks with attention between channels, whose cost is linear in the number of pixels. Written
from the paper; the published weights load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from kdsr.archs.arch_checks import is_whole, minimum_problems, require_multiple
from kdsr.archs.restormer_blocks import TransformerBlock, patch_embed, resample
from kdsr.runtime.errors import OptionError

_LAYER_NORMS = ("WithBias", "BiasFree")


@ARCH_REGISTRY.register()
class Restormer(nn.Module):
    """Restoration of (N, inp_channels, H, W) in [0, 1] to (N, out_channels, H, W), about [0, 1].

    The input is added to the output, except with ``dual_pixel_task``. H and W must be multiples of 8 (validation pads).

    Args:
        inp_channels: Channels of the input.
        out_channels: Channels of the output.
        dim: Channels of the first level; doubled per level.
        num_blocks: Blocks of the four levels; encoder and decoder have the same numbers.
        num_refinement_blocks: Blocks at full size after the decoder.
        heads: Attention heads of the four levels.
        ffn_expansion_factor: Hidden width of the feed-forward networks, relative to the level's.
        bias: Whether the convolutions have biases.
        LayerNorm_type: ``WithBias``, or ``BiasFree`` (the paper's denoising networks).
        dual_pixel_task: Defocus deblurring of two views (6 channels in, 3 out), with a skip connection of features
            instead of the image.

    Raises:
        OptionError: Values are invalid.
        DataError: H or W is not a multiple of 8.
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
        if problems := self.option_problems(locals()):
            raise OptionError([f"Restormer: {problem}" for problem in problems])

        def level(index: int, channels: int, number: int) -> nn.Sequential:
            shape = (channels, heads[index], ffn_expansion_factor, bias, LayerNorm_type)
            return nn.Sequential(*(TransformerBlock(*shape) for _ in range(number)))

        self.patch_embed = patch_embed(inp_channels, dim)
        self.encoder_level1 = level(0, dim, num_blocks[0])
        self.down1_2 = resample(dim, up=False)
        self.encoder_level2 = level(1, 2 * dim, num_blocks[1])
        self.down2_3 = resample(2 * dim, up=False)
        self.encoder_level3 = level(2, 4 * dim, num_blocks[2])
        self.down3_4 = resample(4 * dim, up=False)
        self.latent = level(3, 8 * dim, num_blocks[3])
        self.up4_3 = resample(8 * dim, up=True)
        self.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=bias)
        self.decoder_level3 = level(2, 4 * dim, num_blocks[2])
        self.up3_2 = resample(4 * dim, up=True)
        self.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=bias)
        self.decoder_level2 = level(1, 2 * dim, num_blocks[1])
        self.up2_1 = resample(2 * dim, up=True)  # concatenated without reduction: 2 * dim channels
        self.decoder_level1 = level(0, 2 * dim, num_blocks[0])
        self.refinement = level(0, 2 * dim, num_refinement_blocks)
        self.dual_pixel_task = dual_pixel_task
        if dual_pixel_task:
            self.skip_conv = nn.Conv2d(dim, 2 * dim, 1, bias=bias)
        self.output = nn.Conv2d(2 * dim, out_channels, 3, padding=1, bias=bias)

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """Problems of the constructor's options that its signature does not show."""
        found = minimum_problems(options, inp_channels=1, out_channels=1, dim=1, num_refinement_blocks=0)
        dim = options.get("dim", 48)
        for key, lowest in (("num_blocks", 0), ("heads", 1)):
            numbers = options.get(key)
            if isinstance(numbers, list | tuple) and (len(numbers) != 4 or not is_whole(numbers, lowest)):
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
            # level 1 has dim channels in the encoder and 2 * dim in the decoder, with the same heads
            odd = [str(number) for index, number in enumerate(heads) if dim * 2**index % number]
            if odd:
                found.append(
                    f"heads: {', '.join(odd)} does not divide the channels of its level (dim {dim}, doubled per level)"
                )
        expansion = options.get("ffn_expansion_factor", 2.66)
        if isinstance(expansion, int | float) and int(dim * expansion) < 1:
            found.append(f"ffn_expansion_factor: {expansion} leaves no channels")
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
