"""Padding for networks that need image sides divisible by a number."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def extended(lq: Tensor, multiple_of: int) -> Tensor:
    """Extends (N, C, H, W) by reflection at the bottom and the right, to sides divisible by ``multiple_of``.

    Repeatedly where the image is smaller than the extension.
    """
    height, width = (-(-size // multiple_of) * multiple_of for size in lq.shape[-2:])
    image = lq
    while image.shape[-2:] != (height, width):  # reflection extends by at most size - 1 at a time
        h, w = image.shape[-2:]
        down, right = min(height - h, h - 1), min(width - w, w - 1)
        mode = "reflect" if h > 1 and w > 1 else "replicate"
        if mode == "replicate":
            down, right = height - h, width - w
        image = F.pad(image, (0, right, 0, down), mode=mode)
    return image


def pad_and_restore(net: Callable[[Tensor], Tensor], lq: Tensor, multiple_of: int, scale: int) -> Tensor:
    """Runs a network that needs sizes divisible by ``multiple_of`` on an image of any size.

    The image is extended by reflection at the bottom and the right, and the result is cropped.

    Args:
        net: Maps (N, C, H, W) to (N, C, H·scale, W·scale).
        lq: (N, C, H, W).
        multiple_of: The number that H and W must be divisible by; 1 for any size.
        scale: Upscaling factor of the network.

    Returns:
        (N, C, H·scale, W·scale).
    """
    height, width = lq.shape[-2:]
    return net(extended(lq, multiple_of))[..., : height * scale, : width * scale]
