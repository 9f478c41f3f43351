"""VGG19 up to relu5_1, the frozen extractor of contrastive and perceptual losses.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015 (arXiv
1409.1556), configuration E; in distillation: CSD (arXiv 2105.11683). torchvision's file loads by name.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from kdsr.runtime.errors import DataError

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 4, 4, 1)  # without the last three convolutions, which relu5_1 does not need
SMALLEST = 2 ** (len(WIDTHS) - 1)

# ImageNet's means and standard deviations, as expected by torchvision's weights.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@ARCH_REGISTRY.register()
class VGG19(nn.Module):
    """The first 13 convolutions of VGG19, with torchvision's parameter names (``features.0.weight``).

    torchvision's file (``vgg19-dcbb9e9d.pth``, a bare state dict) also holds three more convolutions and a classifier,
    which ``strict_load_X: false`` ignores. Every tensor of this network must be in the file in any case.
    """

    required_prefixes = ("features.",)
    memory_format_on_cpu = torch.channels_last  # faster there (docs/benchmarks.md, "Levers")
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        self.levels: list[int] = []  # indices of the first ReLU of each block
        for width, depth in zip(WIDTHS, DEPTHS, strict=True):
            if layers:
                layers.append(nn.MaxPool2d(2, 2))
            self.levels.append(len(layers) + 1)
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor, levels: int | None = None) -> list[Tensor]:
        """Extracts features.

        Args:
            x: (N, 3, H, W) RGB in [0, 1], at least 16 pixels per side.
            levels: Only so many are computed, the finest; None: all.

        Returns:
            relu1_1 to relu5_1: 64, 128, 256, 512, 512 channels at 1, 1/2, 1/4, 1/8, 1/16 (rounded down).

        Raises:
            DataError: The images are smaller.
        """
        if min(x.shape[-2:]) < SMALLEST:
            raise DataError(
                f"VGG19: images of {x.shape[-2]}x{x.shape[-1]} pixels are too small, it downsamples by {SMALLEST}; "
                f"set gt_size to {SMALLEST} or more"
            )
        x = (x - self.mean) / self.std
        features = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.levels:
                features.append(x)
                if len(features) == levels:
                    break
        return features
