"""PReNet (Ren et al., "Progressive Image Deraining Networks: A Better and Simpler Baseline", CVPR 2019,
arXiv 1901.09221): a small recurrent network on the input and its own previous output.

Written from the paper; the published weights load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from kdsr.archs.arch_checks import minimum_problems
from kdsr.runtime.errors import OptionError


@ARCH_REGISTRY.register()
class PReNet(nn.Module):
    """Restoration of (N, C, H, W) in [0, 1] to the same size, about [0, 1], of any H and W.

    The four networks of the paper: PReNet, PReNet_r (``recursive``), PRN (``lstm: false``) and PRN_r (both).

    Args:
        img_channel: Channels of input and output.
        num_feat: Width.
        recurrent_iter: Stages, with shared weights.
        num_block: Residual blocks of a stage.
        lstm: Passes features between stages by a convolutional LSTM.
        recursive: Shares one residual block within a stage.

    Raises:
        OptionError: A number is below 1.
    """

    def __init__(
        self,
        img_channel: int = 3,
        num_feat: int = 32,
        recurrent_iter: int = 6,
        num_block: int = 5,
        lstm: bool = True,
        recursive: bool = False,
    ) -> None:
        super().__init__()
        if problems := self.option_problems(locals()):
            raise OptionError([f"PReNet: {problem}" for problem in problems])
        self.num_feat, self.recurrent_iter, self.num_block = num_feat, recurrent_iter, num_block
        self.lstm, self.recursive = lstm, recursive
        self.conv0 = _conv(2 * img_channel, num_feat, nn.ReLU())
        for index in range(1, 1 + (1 if recursive else num_block)):  # numbered as in the published weights
            block = nn.Sequential(
                *_conv(num_feat, num_feat, nn.ReLU()), *_conv(num_feat, num_feat, nn.ReLU())
            )
            self.add_module(f"res_conv{index}", block)
        if lstm:
            self.conv_i = _conv(2 * num_feat, num_feat, nn.Sigmoid())
            self.conv_f = _conv(2 * num_feat, num_feat, nn.Sigmoid())
            self.conv_g = _conv(2 * num_feat, num_feat, nn.Tanh())
            self.conv_o = _conv(2 * num_feat, num_feat, nn.Sigmoid())
        self.conv = nn.Sequential(nn.Conv2d(num_feat, img_channel, 3, padding=1))

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """Problems of the constructor's options that its signature does not show."""
        return minimum_problems(options, img_channel=1, num_feat=1, recurrent_iter=1, num_block=1)

    def forward(self, x: Tensor) -> Tensor:
        output = x
        hidden = cell = x.new_zeros(x.shape[0], self.num_feat, *x.shape[2:])
        for _ in range(self.recurrent_iter):
            h = self.conv0(torch.cat([x, output], 1))
            if self.lstm:
                both = torch.cat([h, hidden], 1)
                cell = self.conv_f(both) * cell + self.conv_i(both) * self.conv_g(both)
                h = hidden = self.conv_o(both) * torch.tanh(cell)
            for index in range(1, 1 + self.num_block):
                h = F.relu(h + getattr(self, f"res_conv{1 if self.recursive else index}")(h))
            output = self.conv(h) + x
        return output


def _conv(in_channels: int, channels: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), activation)
