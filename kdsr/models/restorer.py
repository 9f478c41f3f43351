"""Restorer: images of any size through a network, as the options ``val`` say."""

from __future__ import annotations

import math
from typing import Any

from basicsr.models.sr_model import SRModel
from basicsr.models.swinir_model import SwinIRModel
from torch import Tensor, nn

from kdsr.distill.padding import extended, pad_and_restore
from kdsr.models.self_ensemble import self_ensemble
from kdsr.models.tiling import tile_of, tiled


class Restorer:
    """Runs a network on images of any size: padded, whole or in tiles, with one view or with eight.

    Args:
        opt: The parsed options.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self.val = opt.get("val") or {}
        self.scale = opt.get("scale") or 1

    def multiple_of(self, net: nn.Module) -> int:
        """What an image's height and width must be divisible by for ``net``, by itself and by the options ``val``."""
        wanted = int(self.val.get("multiple_of") or self.val.get("window_size") or 1)
        return math.lcm(declared_multiple(net), wanted)

    def __call__(self, net: nn.Module, lq: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H·scale, W·scale), in eval mode."""
        tile = tile_of(self.val)
        # Self-ensemble within a tile: the mean of the views then needs a tile's memory, not an image's.
        restore = self_ensemble(net) if self.val.get("self_ensemble") else net
        training = net.training
        net.eval()
        try:
            if tile is not None:
                return tiled(restore, lq, *tile, self.scale, self.multiple_of(net))
            return pad_and_restore(restore, lq, self.multiple_of(net), self.scale)
        finally:
            net.train(training)


def declared_multiple(net: nn.Module) -> int:
    """What the sides of an image must be divisible by, as the network declares it; 1 where it declares nothing."""
    declared: Any = getattr(net, "multiple_of", None) or getattr(net, "window_size", None)
    if declared is None:  # BasicSR's SwinIR leaves it to its blocks
        windows = (getattr(module, "window_size", None) for module in net.modules())
        declared = math.lcm(*(window for window in windows if isinstance(window, int)))
    return int(declared)


def pad_in_tests(model: Any, opt: dict[str, Any]) -> None:
    """Lets a model of BasicSR's test images of any size: pads its input and crops its output.

    Of BasicSR's models only SwinIRModel pads, by less than the size of the image; the others end in a traceback on an
    image that is no multiple of a window. A model with a ``test`` of its own is left as it is.

    Args:
        model: An SRModel or a child of it.
        opt: The options; ``val.window_size`` is used, as in our models.
    """
    if getattr(type(model), "test", None) not in (SRModel.test, SwinIRModel.test):
        return
    stock = model.test
    asked = int((opt.get("val") or {}).get("window_size") or 1)
    multiple = math.lcm(asked, declared_multiple(model.get_bare_model(model.net_g)))

    def test() -> None:
        whole = model.lq
        model.lq = extended(whole, multiple)
        stock()
        model.lq = whole
        height, width = (side * (opt.get("scale") or 1) for side in whole.shape[-2:])
        model.output = model.output[..., :height, :width]

    if multiple > 1:
        model.test = test
