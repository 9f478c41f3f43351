"""Reads RCAN's published weights (EDSR-PyTorch's names) as a state dict with BasicSR's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kdsr.runtime.errors import CheckpointError
from kdsr.runtime.torch_files import read_torch_file

# within a block: convolution, ReLU, convolution, channel attention
_RULES = (
    (r"head\.0\.", "conv_first."),
    (r"body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.0\.", r"body.\1.residual_group.\2.rcab.3.attention.1."),
    (r"body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.2\.", r"body.\1.residual_group.\2.rcab.3.attention.3."),
    (r"body\.(\d+)\.body\.(\d+)\.body\.([02])\.", r"body.\1.residual_group.\2.rcab.\3."),
    (r"body\.(\d+)\.body\.\d+\.", r"body.\1.conv."),
    (r"body\.\d+\.", "conv_after_body."),
    (r"tail\.0\.(\d+)\.", r"upsample.\1."),
    (r"tail\.1\.", "conv_last."),
)
_SHIFTS = ("sub_mean.", "add_mean.")  # BasicSR has the mean as an option


def basicsr_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors.

    Raises:
        CheckpointError: A name is none of RCAN's.
    """
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith(_SHIFTS):
            continue
        for pattern, ours in _RULES:
            found = re.match(pattern, name)
            if found:
                renamed[found.expand(ours) + name[found.end() :]] = tensor
                break
        else:
            raise CheckpointError(f"{name} is no tensor of RCAN")
    return renamed


def read_rcan(file: Path) -> dict[str, Tensor]:
    """The state dict of a published ``.pt`` file.

    Raises:
        CheckpointError: It is another file.
    """
    return basicsr_names(read_torch_file(file))
