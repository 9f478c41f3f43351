"""Recognises the architecture of a checkpoint by its tensors' names."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

# Tensors that every network of the type has and no other type has all of. Types that spandrel recognises under the
# same name are left to spandrel.
_TYPES = {
    "Restormer": ("patch_embed.proj.weight", "encoder_level1.0.attn.qkv_dwconv.weight", "output.weight"),
    "EDSR": ("conv_first.weight", "body.0.conv1.weight", "conv_after_body.weight", "upsample.0.weight"),
    "MSRResNet": ("conv_first.weight", "body.0.conv1.weight", "upconv1.weight", "conv_hr.weight"),
    "RCAN": ("conv_first.weight", "body.0.residual_group.0.rcab.0.weight"),
    "RRDBNet": ("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_up1.weight"),
    "RLFN": ("conv_1.weight", "block_1.c1_r.weight", "block_1.esa.conv1.weight", "upsampler.0.weight"),
    "PReNet": ("conv0.0.weight", "res_conv1.0.weight", "conv.0.weight"),
    "ECBSR": ("backbone.0.conv3x3.weight", "backbone.0.conv1x1_sbx.k0"),
    "RIDNet": ("sub_mean.weight", "head.weight", "body.0.merge.dilation1.0.weight"),
    "VQGAN": ("encoder.conv_in.weight", "quant_conv.weight", "quantize.embedding.weight"),
}


def known_type(names: Collection[str]) -> str | None:
    """The ``type`` of a BasicSR or kdsr network that has tensors of these names, or None."""
    return next((kind for kind, needed in _TYPES.items() if all(name in names for name in needed)), None)


def spandrel_architecture(weights: Mapping[str, Any]) -> Any:
    """spandrel's architecture of a state dict, or None."""
    import spandrel  # takes a second

    for entry in spandrel.MAIN_REGISTRY.architectures("detection"):
        with contextlib.suppress(Exception):  # some read shapes of tensors of unexpected dimensions
            if entry.detect(weights):
                return entry.architecture
    return None


def architecture_name(weights: Mapping[str, Any]) -> str | None:
    """The name of a state dict's architecture for messages, or None."""
    if kind := known_type(weights.keys()):
        return kind
    found = spandrel_architecture(weights)
    return found.name if found else None
