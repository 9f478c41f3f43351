"""The files of pretrained weights that the options name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY


def weight_files(opt: Mapping[str, Any]) -> dict[str, Any]:
    """The file of weights of each network, by the network's key (``t``).

    It is ``path.pretrain_network_<key>``, or the file that the network itself reads (``type: Spandrel``).
    """
    known = dict(iter(ARCH_REGISTRY))
    files: dict[str, Any] = {
        key.removeprefix("network_"): options.get("path")
        for key, options in opt.items()
        if key.startswith("network_")
        and isinstance(options, dict)
        and getattr(known.get(str(options.get("type"))), "BRINGS_WEIGHTS", False)
    }
    files |= {
        key.removeprefix("pretrain_network_"): file
        for key, file in (opt.get("path") or {}).items()
        if key.startswith("pretrain_network_") and file
    }
    return files
