"""L1 between the Fourier transforms of two images.

As in MIMO-UNet (Cho et al., ICCV 2021), which adds it to the pixel loss with the weight 0.1, and in what followed it.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from kdsr.losses.mscn import widened
from kdsr.runtime.errors import OptionError

NORMS = ("backward", "ortho")


def frequency_distance(output: Tensor, target: Tensor, norm: str = "backward") -> Tensor:
    """Mean absolute difference of the real and imaginary parts over the whole spectrum, all images and channels.

    Args:
        output: (N, C, H, W).
        target: The same shape.
        norm: ``backward``: no factor, as is usual, so that the value grows with the size of the images. ``ortho``: the
            transform is divided by sqrt(H·W).

    Returns:
        A scalar; float32 when the images are narrower.
    """
    spectrum = torch.fft.fft2(widened(output - target), norm=norm)  # the transform is linear
    return torch.view_as_real(spectrum).abs().mean()


@LOSS_REGISTRY.register()
class FFTLoss(nn.Module):
    """``frequency_distance`` as a loss of option files.

    Args:
        loss_weight: Factor of the term (MIMO-UNet: 0.1).
        norm: ``backward`` or ``ortho``: whether the transform is divided by the square root of the number of pixels.

    Raises:
        OptionError: ``norm`` is none of those.
    """

    def __init__(self, loss_weight: float = 1.0, norm: str = "backward") -> None:
        super().__init__()
        if norm not in NORMS:
            raise OptionError(f"FFTLoss: norm {norm!r} is unknown; it can be {' or '.join(NORMS)}")
        self.loss_weight = loss_weight
        self.norm = norm

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Images, (N, C, H, W) each -> scalar."""
        return self.loss_weight * frequency_distance(output, target, self.norm)
