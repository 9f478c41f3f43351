"""Features per level, of any frozen extractor."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdsr.runtime.errors import OptionError


def features_of(output: Any, extractor: nn.Module, levels: int) -> list[Tensor]:
    """The features in the output of an extractor, finest level first, (N, C, H, W) each.

    Args:
        output: A list of features (VGG19), or a tuple that begins with one (VQGAN).
        extractor: The network, for messages.
        levels: The expected number of levels.

    Raises:
        OptionError: There are more or fewer levels, or they are no feature maps.
    """
    features = output[0] if isinstance(output, tuple) else output
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
