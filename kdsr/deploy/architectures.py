"""Reads the options of BasicSR's and this package's networks from the names and shapes of their tensors.

A reader returns the arguments that tensors show, and for those that they do not show the values to choose from. It
raises a ``LookupError``, ``ValueError``, ``ArithmeticError`` or ``StopIteration`` for the tensors of another network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

Options = dict[str, Any]
# options that tensors do not show -> values to choose from, the usual one first
Unknown = dict[str, list[Any]]

DIV2K_MEAN = [0.4488, 0.4371, 0.4040]  # of RGB, what EDSR, RCAN and SwinIR subtract
_RANGE = {"img_range": [255.0, 1.0]}
_RANGE_AND_MEAN = _RANGE | {"rgb_mean": [DIV2K_MEAN, [0.0, 0.0, 0.0]]}


class Shapes:
    """Shapes of tensors by name. Raises a ``KeyError`` for names that do not exist."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tuple(value.shape) for name, value in weights.items()}

    def __call__(self, name: str, dim: int = 0) -> int:
        return self.shapes[name][dim]

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def count(self, pattern: str) -> int:
        """Numbers of the pattern ``a.(\\d+).b``: one more than the largest; 0 if no name matches."""
        found = (re.match(pattern, name) for name in self.shapes)
        number = 1 + max((int(match[1]) for match in found if match), default=-1)
        if number > len(self.shapes) + 1:
            raise ValueError(number)  # not one after the other
        return number

    def counts(self, pattern: str, levels: int) -> list[int]:
        """``count`` for each level, whose number replaces ``{}``."""
        return [self.count(pattern.format(level)) for level in range(levels)]


def _square(number: float) -> int:
    root = math.isqrt(int(number))
    if root * root != number:
        raise ValueError(number)
    return root


def _upscale(shapes: Shapes, name: str, width: int) -> int:
    """Factor of BasicSR's ``Upsample``: convolutions to 4 times the channels, or one to 9 times."""
    factors = [
        shape[0] // width
        for key, shape in shapes.shapes.items()
        if re.fullmatch(rf"{name}\.\d+\.weight", key) and len(shape) == 4
    ]
    return math.isqrt(math.prod(factors))


def _ratio(hidden: int, width: int, usual: Iterable[float]) -> float:
    """A factor for which ``int(width * factor)`` is ``hidden``: a usual one, else the exact one."""
    exact = (hidden / width, (hidden + 0.5) / width)
    return next(factor for factor in (*usual, *exact) if int(width * factor) == hidden)


# ------------------------------------------------------------------------------------------------ the architectures


def _edsr(shapes: Shapes) -> tuple[Options, Unknown]:
    width = shapes("conv_first.weight")
    found = {
        "num_in_ch": shapes("conv_first.weight", 1),
        "num_out_ch": shapes("conv_last.weight"),
        "num_feat": width,
        "num_block": shapes.count(r"body\.(\d+)\.conv1\.weight"),
        "upscale": _upscale(shapes, "upsample", width),
    }
    usual = [0.1, 1] if width >= 256 else [1, 0.1]  # 256 channels do not train with 1
    return found, {"res_scale": usual, **_RANGE_AND_MEAN}


def _rcan(shapes: Shapes) -> tuple[Options, Unknown]:
    width = shapes("conv_first.weight")
    found = {
        "num_in_ch": shapes("conv_first.weight", 1),
        "num_out_ch": shapes("conv_last.weight"),
        "num_feat": width,
        "num_group": shapes.count(r"body\.(\d+)\.conv\.weight"),
        "num_block": shapes.count(r"body\.0\.residual_group\.(\d+)\.rcab\.0\.weight"),
        "squeeze_factor": width // shapes("body.0.residual_group.0.rcab.3.attention.1.weight"),
        "upscale": _upscale(shapes, "upsample", width),
    }
    return found, {"res_scale": [1, 0.1], **_RANGE_AND_MEAN}


def _rrdbnet(shapes: Shapes) -> tuple[Options, Unknown]:
    taken, given = shapes("conv_first.weight", 1), shapes("conv_last.weight")
    scale = {1: 4, 4: 2, 16: 1}[taken // given]  # the input of x2 and x1 is folded into channels
    found = {
        "num_in_ch": given,
        "num_out_ch": given,
        "scale": scale,
        "num_feat": shapes("conv_first.weight"),
        "num_block": shapes.count(r"body\.(\d+)\.rdb1\.conv1\.weight"),
        "num_grow_ch": shapes("body.0.rdb1.conv1.weight"),
    }
    return found, {}


def _srvggnetcompact(shapes: Shapes) -> tuple[Options, Unknown]:
    channels = shapes("body.0.weight", 1)
    numbers = [
        int(name.split(".")[1])
        for name, shape in shapes.shapes.items()
        if re.fullmatch(r"body\.\d+\.weight", name) and len(shape) == 4
    ]
    found = {
        "num_in_ch": channels,
        "num_out_ch": channels,
        "num_feat": shapes("body.0.weight"),
        "num_conv": len(numbers) - 2,
        "upscale": _square(shapes(f"body.{max(numbers)}.weight") / channels),
    }
    if "body.1.weight" in shapes:
        return found | {"act_type": "prelu"}, {}
    return found, {"act_type": ["relu", "leakyrelu"]}


def _msrresnet(shapes: Shapes) -> tuple[Options, Unknown]:
    width = shapes("conv_first.weight")
    found = {
        "num_in_ch": shapes("conv_first.weight", 1),
        "num_out_ch": shapes("conv_last.weight"),
        "num_feat": width,
        "num_block": shapes.count(r"body\.(\d+)\.conv1\.weight"),
        "upscale": 4 if "upconv2.weight" in shapes else _square(shapes("upconv1.weight") / width),
    }
    return found, {}


def _swinir(shapes: Shapes) -> tuple[Options, Unknown]:
    width, channels = shapes("conv_first.weight"), shapes("conv_first.weight", 1)
    groups = shapes.count(r"layers\.(\d+)\.")
    block = "layers.{}.residual_group.blocks.0."
    first = block.format(0)
    window = (_square(shapes(f"{first}attn.relative_position_bias_table")) + 1) // 2
    upsampler = "nearest+conv" if "conv_up1.weight" in shapes else "pixelshuffle"
    if "conv_before_upsample.0.weight" not in shapes:
        upsampler = "pixelshuffledirect" if "upsample.0.weight" in shapes else ""
    upscale = {"nearest+conv": 4, "": 1}.get(upsampler)
    if upsampler == "pixelshuffledirect":
        upscale = _square(shapes("upsample.0.weight") / channels)
    found = {
        "in_chans": channels,
        "upscale": upscale or _upscale(shapes, "upsample", 64),
        "img_size": _swinir_size(shapes, window),
        "window_size": window,
        "embed_dim": width,
        "depths": shapes.counts(r"layers\.{}\.residual_group\.blocks\.(\d+)\.", groups),
        "num_heads": [
            shapes(f"{block.format(group)}attn.relative_position_bias_table", 1) for group in range(groups)
        ],
        "mlp_ratio": _ratio(shapes(f"{first}mlp.fc1.weight"), width, (2, 4)),
        "qkv_bias": f"{first}attn.qkv.bias" in shapes,
        "ape": "absolute_pos_embed" in shapes,
        "patch_norm": "patch_embed.norm.weight" in shapes,
        "upsampler": upsampler,
        "resi_connection": "1conv" if "conv_after_body.weight" in shapes else "3conv",
    }
    return found, {"img_range": [1.0, 255.0]}


def _swinir_size(shapes: Shapes, window: int) -> int:
    """The size of image that a SwinIR was built for: its masks and positions have it."""
    if "absolute_pos_embed" in shapes:
        return _square(shapes("absolute_pos_embed", 1))
    masks = [shape[0] for name, shape in shapes.shapes.items() if name.endswith(".attn_mask")]
    if masks:
        return _square(masks[0]) * window
    shifted = any(".blocks.1." in name for name in shapes.shapes)
    return window if shifted else 8 * window  # without shifted windows any size has the same tensors


def _nafnet(shapes: Shapes) -> tuple[Options, Unknown]:
    levels = shapes.count(r"downs\.(\d+)\.weight")
    found = {
        "img_channel": shapes("intro.weight", 1),
        "width": shapes("intro.weight"),
        "middle_blk_num": shapes.count(r"middle_blks\.(\d+)\."),
        "enc_blk_nums": shapes.counts(r"encoders\.{}\.(\d+)\.", levels),
        "dec_blk_nums": shapes.counts(r"decoders\.{}\.(\d+)\.", levels),
    }
    return found, {}


def _restormer(shapes: Shapes) -> tuple[Options, Unknown]:
    dim = shapes("patch_embed.proj.weight")
    levels = ["encoder_level1", "encoder_level2", "encoder_level3", "latent"]
    hidden = shapes("latent.0.ffn.project_out.weight", 1)
    first = shapes("encoder_level1.0.ffn.project_out.weight", 1)
    exact = (hidden / (8 * dim), (hidden + 0.5) / (8 * dim))
    usual = (factor for factor in (2.66, *exact) if int(8 * dim * factor) == hidden)
    found = {
        "inp_channels": shapes("patch_embed.proj.weight", 1),
        "out_channels": shapes("output.weight"),
        "dim": dim,
        "num_blocks": [shapes.count(rf"{level}\.(\d+)\.") for level in levels],
        "num_refinement_blocks": shapes.count(r"refinement\.(\d+)\."),
        "heads": [shapes(f"{level}.0.attn.temperature") for level in levels],
        "ffn_expansion_factor": _ratio(first, dim, usual),
        "bias": "encoder_level1.0.attn.qkv.bias" in shapes,
        "LayerNorm_type": "WithBias" if "encoder_level1.0.norm1.body.bias" in shapes else "BiasFree",
        "dual_pixel_task": "skip_conv.weight" in shapes,
    }
    return found, {}


def _rlfn(shapes: Shapes) -> tuple[Options, Unknown]:
    channels = shapes("conv_1.weight", 1)
    found = {
        "in_channels": channels,
        "out_channels": channels,
        "feature_channels": shapes("conv_1.weight"),
        "num_blocks": shapes.count(r"block_(\d+)\.") - 1,  # numbered from 1
        "esa_channels": shapes("block_1.esa.conv1.weight"),
        "upscale": _square(shapes("upsampler.0.weight") / channels),
    }
    return found, dict(_RANGE)


def _prenet(shapes: Shapes) -> tuple[Options, Unknown]:
    blocks = shapes.count(r"res_conv(\d+)\.") - 1  # numbered from 1
    found = {
        "img_channel": shapes("conv.0.weight"),
        "num_feat": shapes("conv0.0.weight"),
        "lstm": "conv_i.0.weight" in shapes,
    }
    stages: Unknown = {"recurrent_iter": [6, *(number for number in range(1, 9) if number != 6)]}
    if blocks > 1:
        return found | {"num_block": blocks, "recursive": False}, stages
    # one block: repeated, as in the paper's recursive networks
    return found | {"recursive": True}, {"num_block": [5, 1], **stages}


READERS: dict[str, Callable[[Shapes], tuple[Options, Unknown]]] = {
    "EDSR": _edsr,
    "RCAN": _rcan,
    "RRDBNet": _rrdbnet,
    "SRVGGNetCompact": _srvggnetcompact,
    "MSRResNet": _msrresnet,
    "SwinIR": _swinir,
    "NAFNet": _nafnet,
    "Restormer": _restormer,
    "RLFN": _rlfn,
    "PReNet": _prenet,
}

_RGB = {"num_in_ch": 3, "num_out_ch": 3}
SMALL: dict[str, Options] = {  # has all names of tensors of its type, apart from numbers
    "EDSR": {**_RGB, "num_feat": 4, "num_block": 1},
    "RCAN": {**_RGB, "num_feat": 16, "num_group": 1, "num_block": 1},
    "RRDBNet": {**_RGB, "num_feat": 4, "num_block": 1, "num_grow_ch": 4},
    "SRVGGNetCompact": {"num_feat": 4, "num_conv": 1},
    "MSRResNet": {"num_feat": 4, "num_block": 1},
    "SwinIR": {
        "depths": [2],
        "num_heads": [1],
        "embed_dim": 4,
        "window_size": 4,
        "upsampler": "pixelshuffle",
    },
    "NAFNet": {"width": 4, "enc_blk_nums": [1], "dec_blk_nums": [1]},
    "Restormer": {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1},
    "RLFN": {"feature_channels": 4, "num_blocks": 1, "esa_channels": 4},
    "PReNet": {"num_feat": 4, "num_block": 1},
}
