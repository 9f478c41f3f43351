"""Images as a frozen network sees them: features per level, of any extractor."""

from __future__ import annotations

from torch import Tensor, nn

from kdsr.runtime.errors import OptionError


def extract_features(extractor: nn.Module, images: Tensor, levels: int) -> list[Tensor]:
    """The features of images, finest level first, (N, C, H, W) each; with gradient where the images have one.

    Args:
        extractor: Its forward gives a list of features (VGG19), or a tuple that begins with one (VQGAN).
        images: (N, 3, H, W) in [0, 1].
        levels: How many there have to be.

    Raises:
        OptionError: There are more or fewer, or they are no feature maps.
    """
    features = extractor(images)
    if isinstance(features, tuple):
        features = features[0]
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
