"""Checkpoints of tiny networks, written from spandrel's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from spandrel import ImageModelDescriptor, ModelLoader
from spandrel.architectures.DnCNN import DnCNN
from spandrel.architectures.HAT import HAT
from spandrel.architectures.NAFNet import NAFNet
from spandrel.architectures.RCAN import RCAN
from spandrel.architectures.SAFMN import SAFMN
from spandrel.architectures.SwinIR import SwinIR
from spandrel.architectures.Uformer import Uformer
from torch import nn

# name -> class, arguments, scale, a size that it takes as it is
TINY: dict[str, tuple[Any, dict[str, Any], int, tuple[int, int]]] = {
    "SwinIR": (
        SwinIR,
        {"img_size": 16, "window_size": 8, "depths": [2], "embed_dim": 12, "num_heads": [2], "mlp_ratio": 2,
         "upscale": 2, "upsampler": "pixelshuffledirect"},
        2,
        (16, 24),
    ),
    "HAT": (
        HAT,
        {"window_size": 8, "depths": [2], "embed_dim": 12, "num_heads": [2], "mlp_ratio": 2, "compress_ratio": 3,
         "squeeze_factor": 6, "upscale": 2, "upsampler": "pixelshuffle"},
        2,
        (16, 24),
    ),
    "NAFNet": (
        NAFNet,
        {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
        1,
        (16, 24),
    ),
    "SAFMN": (SAFMN, {"dim": 12, "n_blocks": 1, "upscaling_factor": 2}, 2, (16, 24)),
    "Uformer": (
        Uformer,
        {"embed_dim": 8, "dd_in": 3, "depths": [1] * 9, "num_heads": [1] * 9, "mlp_ratio": 1.0},
        1,
        (128, 128),
    ),
    "RCAN": (RCAN, {"scale": 2, "n_resgroups": 1, "n_resblocks": 1, "n_feats": 16, "reduction": 4}, 2, (16, 24)),
    "DnCNN": (DnCNN, {"in_nc": 1, "out_nc": 1, "nc": 8, "nb": 9, "act_mode": "R"}, 1, (16, 24)),
}  # fmt: skip


def made(name: str, seed: int = 0) -> nn.Module:
    """A tiny network of spandrel's class, none of whose parameters is left at zero."""
    cls, arguments, *_ = TINY[name]
    torch.manual_seed(seed)
    net = cls(**arguments)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return net


def write(name: str, file: Path, seed: int = 0, key: str | None = "params") -> Path:
    """Its weights as BasicSR saves them, or bare."""
    state = made(name, seed).state_dict()
    torch.save({key: state} if key else state, file)
    return file


def plain(file: Path | str) -> ImageModelDescriptor:
    """A file as spandrel alone reads it."""
    found = ModelLoader("cpu").load_from_file(file)
    assert isinstance(found, ImageModelDescriptor)
    return found
