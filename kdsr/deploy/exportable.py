"""Networks in the form that ``torch.export`` can trace for any image size, with the same result.

Two things are rewritten in a copy: SwinIR's blocks compute their window masks and their batch size from Python numbers,
and networks that merge convolutions after training (SPAN's Conv3XC) do so again in each forward pass.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from basicsr.archs.swinir_arch import SwinTransformerBlock, window_partition
from torch import Tensor, nn


def exportable(net: nn.Module) -> nn.Module:
    """A copy of ``net`` in eval mode that can be exported with free sizes, where that is possible."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, SwinTransformerBlock):
            module.attn_mask = None  # of one size
            module.forward = partial(_swin_block, module)
        elif hasattr(module, "update_params") and hasattr(module, "eval_conv"):
            merging: Any = module
            merging.update_params()
            merging.update_params = _nothing
    return net


def _nothing() -> None:
    """In place of the merging of convolutions, which is done."""


def _swin_block(block: Any, x: Tensor, x_size: tuple[int, int]) -> Tensor:
    """``SwinTransformerBlock.forward``: (N, H·W, C) -> same, with the mask as a function of the tensor's size."""
    height, width = x_size
    batch, _, channels = x.shape
    side, shift = block.window_size, block.shift_size
    image = block.norm1(x).view(batch, height, width, channels)
    if shift:
        image = torch.roll(image, (-shift, -shift), (1, 2))
    windows = window_partition(image, side).view(-1, side * side, channels)
    windows = block.attn(windows, mask=_mask(height, width, side, shift, x) if shift else None)
    grid = windows.view(batch, height // side, width // side, side, side, channels)
    image = grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
    if shift:
        image = torch.roll(image, (shift, shift), (1, 2))
    x = x + image.view(batch, height * width, channels)
    return x + block.mlp(block.norm2(x))


def _mask(height: int, width: int, side: int, shift: int, like: Tensor) -> Tensor:
    """(windows, side², side²): -100 between pixels of a shifted window that are no neighbours in the image, else 0."""

    def region(length: int) -> Tensor:
        places = torch.arange(length, device=like.device)
        return (places >= length - side).to(like.dtype) + (places >= length - shift).to(like.dtype)

    regions = 3 * region(height)[:, None] + region(width)[None, :]
    windows = window_partition(regions[None, :, :, None], side).view(-1, side * side)
    return (windows[:, None] - windows[:, :, None] != 0).to(like.dtype) * -100.0
