"""Networks in lists of the options, and the files of pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY

_OF_NETWORK = ("pretrain_network", "strict_load", "param_key")  # of ``path``


def each_network(opt: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options with one entry for each network of a list.

    ``network_t: [A, B]`` becomes ``network_t.0: A`` and ``network_t.1: B``, and so do its options of ``path``. A single
    value applies to every network.
    """
    lists = {
        key: value
        for key, value in opt.items()
        if str(key).startswith("network_") and isinstance(value, list)
    }
    if not lists:
        return dict(opt)
    found = {key: value for key, value in opt.items() if key not in lists}
    path = dict(opt["path"]) if isinstance(opt.get("path"), dict) else {}
    for key, networks in lists.items():
        found |= {f"{key}.{index}": network for index, network in enumerate(networks)}
        for kind in _OF_NETWORK:
            option = f"{kind}_{key.removeprefix('network_')}"
            if option in path:
                value = path.pop(option)
                values = value if isinstance(value, list) else [value] * len(networks)
                path |= {f"{option}.{index}": each for index, each in enumerate(values)}
    return found | {"path": path}


def list_problems(opt: Mapping[str, Any]) -> list[str]:
    """Checks that lists of networks and of their ``path`` options have the same length."""
    path = opt["path"] if isinstance(opt.get("path"), dict) else {}
    problems = []
    for key, networks in opt.items():
        if not str(key).startswith("network_"):
            continue
        count = len(networks) if isinstance(networks, list) else None
        for kind in _OF_NETWORK:
            option = f"{kind}_{key.removeprefix('network_')}"
            value = path.get(option)
            if isinstance(value, list) and len(value) != count:
                there = "one network" if count is None else f"a list of {count} networks"
                problems.append(f"path.{option}: is a list of {len(value)}, and {key} is {there}")
            elif count is not None and kind == "pretrain_network" and isinstance(value, str):
                problems.append(
                    f"path.{option}: {key} is a list of {count} networks; give a list with a file for each"
                )
    return problems


def weight_files(opt: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the file of weights of each network by its key (``t``; ``t.0`` in a list).

    The file is ``path.pretrain_network_<key>``, or the one that the network itself reads (``type: Spandrel``).
    """
    known, opt = dict(iter(ARCH_REGISTRY)), each_network(opt)
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
