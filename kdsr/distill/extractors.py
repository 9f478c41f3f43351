"""Features per level, of any frozen extractor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kdsr.losses.levels import levels_needed
from kdsr.runtime.declarations import Network
from kdsr.runtime.errors import OptionError

EXTRACTOR = {"extractor": Network("Extractor of `csd_opt` and `neg_opt`: `VGG19` or a `VQGAN`.")}
VQGAN = {
    "vqgan": Network("Extractor of `cl_opt` and `ce_opt`, and of `csd_opt` without `network_extractor`.")
}


def vqgan_multiples(opt: Mapping[str, Any], key: str = "network_vqgan") -> dict[str, int]:
    """What the sides of images must be multiples of for a VQGAN; empty where the options do not say."""
    network = opt.get(key)
    ddconfig = network.get("ddconfig") if isinstance(network, dict) else None
    levels = ddconfig.get("ch_mult") if isinstance(ddconfig, dict) else None
    return {key: 2 ** (len(levels) - 1)} if isinstance(levels, list) and levels else {}


def features_of(output: Any, extractor: nn.Module, weights: Sequence[float]) -> list[Tensor]:
    """The features in the output of an extractor, finest level first, (N, C, H, W) each.

    Args:
        output: What the extractor gave.
        extractor: The network, for messages.
        weights: One per level; the output may end at the last that is needed.

    Raises:
        OptionError: There are more or fewer levels, or they are no feature maps.
    """
    name = type(extractor).__name__
    if not isinstance(output, list) or not all(isinstance(x, Tensor) and x.dim() == 4 for x in output):
        raise OptionError(
            f"network_extractor: {name} gives no list of feature maps (N, C, H, W); VGG19 and VQGAN do"
        )
    if len(output) not in (len(weights), levels_needed(weights)):
        raise OptionError(
            f"network_extractor: {name} gives {len(output)} levels of features and the loss has {len(weights)} weights "
            "(option weights, one per level, finest first)"
        )
    return output
