"""Patch discriminator: a real/fake logit per patch of an image.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (pix2pix), CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from kdsr.archs.arch_checks import minimum_problems
from kdsr.runtime.errors import OptionError


@ARCH_REGISTRY.register()
class PatchDiscriminator(nn.Module):
    """Strided convolutions with one output per patch.

    Uses spectral normalisation instead of pix2pix's batch normalisation (our choice), so that results do not depend on
    the batch size or the number of processes.

    Args:
        num_in_ch: Channels of the image.
        num_feat: Channels of the first layer, doubled per layer up to a factor of 8.
        num_layers: Number of strided layers, at least 1; 3 gives patches of 70 pixels.

    Raises:
        OptionError: A number is below 1.
    """

    def __init__(self, num_in_ch: int = 3, num_feat: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if problems := self.option_problems(locals()):
            raise OptionError([f"PatchDiscriminator: {problem}" for problem in problems])
        widths = [num_feat * min(2**layer, 8) for layer in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(num_in_ch, widths[0], 4, stride=2, padding=1)]
        for layer in range(1, num_layers + 1):
            stride = 2 if layer < num_layers else 1
            conv = nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1)
            layers += [nn.LeakyReLU(0.2), spectral_norm(conv)]
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(widths[-1], 1, 4, padding=1)]
        self.body = nn.Sequential(*layers)

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """Problems of the constructor's options that its signature does not show."""
        return minimum_problems(options, num_in_ch=1, num_feat=1, num_layers=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W) -> (N, 1, about H / 2**num_layers, about W / 2**num_layers), unbounded."""
        return self.body(x)
