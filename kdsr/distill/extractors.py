"""Features per level, of any frozen extractor."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdsr.runtime.errors import OptionError


def features_of(answer: Any, extractor: nn.Module, levels: int) -> list[Tensor]:
    """The features in what an extractor gives for images, finest level first, (N, C, H, W) each.

    Args:
        answer: A list of features (VGG19), or a tuple that begins with one (VQGAN).
        extractor: What gave it, for messages.
        levels: How many there have to be.

    Raises:
        OptionError: There are more or fewer, or they are no feature maps.
    """
    features = answer[0] if isinstance(answer, tuple) else answer
    name = type(extractor).__name__
    if not isinstance(features, list) or not all(isinstance(x, Tensor) and x.dim() == 4 for x in features):
        raise OptionError(
            f"network_extractor: {name} gives no list of feature maps (N, C, H, W); VGG19 and VQGAN do"
        )
    if len(features) != levels:
        raise OptionError(
            f"network_extractor: {name} gives {len(features)} levels of features and the loss has {levels} weights "
            "(option weights, one per level, finest first)"
        )
    return features
