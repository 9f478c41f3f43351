"""A teacher whose outputs another program has made."""

from __future__ import annotations

from os import path as osp
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from kdsr.runtime.errors import OptionError


@ARCH_REGISTRY.register()
class Outputs(nn.Module):
    """Images that any program has made of the LQ training images, as a teacher (``network_t``).

    It is never built in a training: patches of the images come with the data.

    Args:
        path: Folder or ``.lmdb`` of the images, with the names of the LQ or the GT images; ``.npy`` arrays, RGB,
            (H·scale, W·scale, 3), are read, too: whole numbers in the range of their type, others in [0, 1].
        flips: Whether the images may be flipped with the patches: whether the output for a flipped image is the
            flipped output. Without it ``use_hflip`` and ``use_rot`` of the training set must be false.
    """

    def __init__(self, path: str, flips: bool = False) -> None:
        super().__init__()

    @staticmethod
    def option_problems(options: dict[str, Any]) -> list[str]:
        """Returns problems of the options beyond their kinds."""
        path = options.get("path")
        if isinstance(path, str) and not osp.isdir(osp.expanduser(path)):
            return [f"path: there is no folder or LMDB {path}"]
        return []

    def forward(self, x: Tensor) -> Tensor:
        raise OptionError(
            "type: Outputs has no network; it can only be the teacher of terms that use its output"
        )
