"""Recognises the architecture and the options of a network by its tensors' names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def recognise(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The options (``type`` and arguments) of the network of a state dict; None where it is not known."""
    for kind in (_edsr, _compact):
        if (found := kind(weights)) is not None:
            return found
    return None


def _edsr(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    if not {"conv_first.weight", "conv_after_body.weight", "upsample.0.weight", "conv_last.weight"} <= (
        weights.keys()
    ):
        return None
    width, channels = weights["conv_first.weight"].shape[:2]
    ups = [value for name, value in weights.items() if name.startswith("upsample.") and value.ndim == 4]
    return {
        "type": "EDSR",
        "num_in_ch": channels,
        "num_out_ch": weights["conv_last.weight"].shape[0],
        "num_feat": width,
        "num_block": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("body.")),
        "upscale": math.prod(math.isqrt(value.shape[0] // width) for value in ups),
    }


def _compact(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    convolutions = [name for name, value in weights.items() if value.ndim == 4]
    if not {"body.0.weight", "body.0.bias"} <= weights.keys() or any(
        name.split(".")[0] != "body" or name.count(".") != 2 for name in weights
    ):
        return None
    width, channels = weights["body.0.weight"].shape[:2]
    return {
        "type": "SRVGGNetCompact",
        "num_in_ch": channels,
        "num_out_ch": channels,
        "num_feat": width,
        "num_conv": len(convolutions) - 2,
        "upscale": math.isqrt(weights[convolutions[-1]].shape[0] // channels),
        "act_type": "prelu" if "body.1.weight" in weights else "relu",
    }
