"""VQGAN: the frozen extractor of DCKD (features and code distribution), and what trains one of your own.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021 (arXiv 2012.09841);
in distillation: DCKD (arXiv 2412.08939). Files of taming-transformers load by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from kdsr.archs.arch_checks import minimum_problems
from kdsr.archs.vqgan_blocks import DDConfig, Decoder, Encoder, is_number
from kdsr.runtime.errors import DataError, OptionError


def _initialise(module: nn.Module) -> None:
    # Ours: keeps the variance. torch's own start shrinks a signal by sqrt(3) in every convolution outside the
    # normalised branches, and of a photograph hardly anything is left after four downsamplings and back.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


class Reconstruction(NamedTuple):
    """What an image becomes: (N, C, H, W) in [0, 1], its encoding and codes.

    ``encoding`` and ``quantized`` are (N, embed_dim, h, w); the gradient of ``image`` reaches the encoder
    straight through the quantization, that of ``quantized`` the codebook. ``codes`` is (N, h, w).
    """

    image: Tensor
    encoding: Tensor
    quantized: Tensor
    codes: Tensor


class Codebook(nn.Module):
    """``n_embed`` vectors of ``embed_dim`` numbers."""

    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_embed, 1.0 / n_embed)

    def logits(self, z: Tensor) -> Tensor:
        """Negative squared distances of (N, embed_dim, h, w) to every code: (N*h*w, n_embed)."""
        # Small differences of large squares: never in half precision, whatever autocast says.
        with torch.autocast(z.device.type, enabled=False):
            dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
            codes = self.embedding.weight.to(dtype)
            tokens = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).to(dtype)
            squares = tokens.square().sum(1, keepdim=True) + codes.square().sum(1)
            return torch.addmm(squares, tokens, codes.t(), alpha=-2.0).neg()

    def look_up(self, codes: Tensor) -> Tensor:
        """(N, h, w) indices -> (N, embed_dim, h, w)."""
        return self.embedding(codes).permute(0, 3, 1, 2)


@ARCH_REGISTRY.register()
class VQGAN(nn.Module):
    """VQGAN with the parameter names of taming-transformers.

    Any image whose sides are at least ``multiple_of`` pixels can be encoded; where a side is no multiple of
    it, the encoding is rounded down, as taming-transformers does. ``reconstruct`` needs multiples.

    Args:
        embed_dim: Length of a code.
        n_embed: Number of codes.
        ddconfig: See :class:`DDConfig`; every key is checked.
        input_range: Images in [0, 1] are mapped to it linearly before the encoder. (0, 1) is what DCKD's
            release feeds; (-1, 1) is what taming-transformers' weights were trained on.
        decoder: Whether to build ``post_quant_conv`` and the decoder, which ``reconstruct`` needs.

    Raises:
        OptionError: Naming each wrong option, those of ``ddconfig`` included.
    """

    required_prefixes = ("encoder.", "quant_conv.", "quantize.")
    further_passes = ("code_logits",)  # methods of a step beside forward
    memory_format_on_cpu = torch.channels_last  # faster there (docs/benchmarks.md, "Levers")

    def __init__(
        self,
        embed_dim: int,
        n_embed: int,
        ddconfig: Mapping[str, Any],
        input_range: Sequence[float] = (0.0, 1.0),
        decoder: bool = False,
    ) -> None:
        super().__init__()
        given = {"embed_dim": embed_dim, "n_embed": n_embed, "ddconfig": ddconfig, "input_range": input_range}
        if problems := self.option_problems(given):
            raise OptionError([f"VQGAN: {problem}" for problem in problems])
        config = DDConfig(**ddconfig)
        self.low, self.high = float(input_range[0]), float(input_range[1])
        self.multiple_of = 2 ** (len(config.ch_mult) - 1)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, embed_dim, 1)
        self.quantize = Codebook(n_embed, embed_dim)
        if decoder:
            self.post_quant_conv = nn.Conv2d(embed_dim, config.z_channels, 1)
            self.decoder = Decoder(config)
        self.apply(_initialise)

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """Problems of the constructor's options that its signature does not show."""
        found = minimum_problems(options, embed_dim=1, n_embed=1)
        ddconfig = options.get("ddconfig", {})
        if not isinstance(ddconfig, Mapping):
            found.append(f"ddconfig: is a section, not {ddconfig!r}")
        elif "ddconfig" in options:
            found += DDConfig.problems(ddconfig)
        low_high = options.get("input_range", (0.0, 1.0))
        pair = isinstance(low_high, list | tuple) and len(low_high) == 2 and all(map(is_number, low_high))
        if not (pair and low_high[0] < low_high[1]):
            found.append(f"input_range: is [low, high], two numbers, not {low_high}")
        return found

    def forward(self, x: Tensor, levels: int | None = None) -> list[Tensor]:
        """Features of images, as every extractor gives them.

        Args:
            x: (N, C, H, W) in [0, 1].
            levels: Only so many are computed, the finest; None: all.

        Returns:
            Per level the output of its first residual block, before attention (taming's f16: 5 levels of 128,
            128, 256, 256 and 512 channels at 1, 1/2, 1/4, 1/8, 1/16).

        Raises:
            DataError: An image is smaller than ``multiple_of`` pixels.
        """
        if min(x.shape[-2:]) < self.multiple_of:
            raise DataError(
                f"VQGAN: images of {x.shape[-2]}x{x.shape[-1]} pixels are too small, it halves them to 1/"
                f"{self.multiple_of}; enlarge gt_size to {self.multiple_of} or more"
            )
        if (self.low, self.high) != (0.0, 1.0):
            x = x * (self.high - self.low) + self.low
        return self.encoder(x, levels)

    def encoding(self, features: Sequence[Tensor]) -> Tensor:
        """The encoding (N, embed_dim, h, w), from features of the same images: only the blocks after them run."""
        return self.quant_conv(self.encoder.encoding(features))

    def code_logits(self, features: Sequence[Tensor]) -> Tensor:
        """Code logits ``-||F - e||^2`` of images, given their features.

        Returns:
            Negative squared distances of each token to each code: (N*h*w, n_embed), rows ordered by n, h, w, never
            below float32.
        """
        return self.quantize.logits(self.encoding(features))

    def reconstruct(self, x: Tensor, quantize: bool = True) -> Reconstruction:
        """Encodes, replaces each token by its nearest code, decodes. Needs ``decoder=True``.

        Args:
            x: (N, C, H, W) in [0, 1], sides multiples of ``multiple_of``.
            quantize: False lets the decoder see the encoding itself (a plain autoencoder).
        """
        if any(side % self.multiple_of for side in x.shape[-2:]):
            raise DataError(
                f"VQGAN: images of {x.shape[-2]}x{x.shape[-1]} pixels cannot be reconstructed, "
                f"their sides must be multiples of {self.multiple_of}"
            )
        z = self.encoding(self(x))
        codes = self.quantize.logits(z.detach()).argmax(1).view(z.shape[0], *z.shape[2:])
        quantized = self.quantize.look_up(codes)
        # straight through: the decoder sees the codes, the encoder gets the decoder's gradient
        image = self.decode(z + (quantized - z).detach() if quantize else z)
        return Reconstruction(image, z, quantized, codes)

    def decode(self, quantized: Tensor) -> Tensor:
        """Images in [0, 1] (unclipped) of (N, embed_dim, h, w)."""
        image = self.decoder(self.post_quant_conv(quantized))
        if (self.low, self.high) != (0.0, 1.0):
            image = (image - self.low) / (self.high - self.low)
        return image
