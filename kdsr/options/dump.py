"""Writes the resolved options as one self-contained file."""

from __future__ import annotations

import copy
import os
import shlex
import sys
from os import path as osp
from pathlib import Path
from typing import Any

import yaml

from kdsr.options.files import EXPONENT_FLOAT, FLOAT_TAG
from kdsr.runtime.atomic_files import atomic_write

# added by parse_options
_DERIVED = ("is_train", "dist", "rank", "world_size", "auto_resume", "root_path", "warnings")
_DERIVED_PATHS = ("models", "training_states", "log", "visualization")


def user_level(opt: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of the options without the keys that :func:`parse_options` adds."""
    options = {key: copy.deepcopy(value) for key, value in opt.items() if key not in _DERIVED}
    for dataset in (options.get("datasets") or {}).values():
        if dataset is not None:
            dataset.pop("phase", None)
            dataset.pop("scale", None)
    path = options.get("path")
    if path and "visualization" in path:  # derived: the root is now the run's folder, not its parent
        for key in _DERIVED_PATHS:
            path.pop(key, None)
        for key in ("experiments_root", "results_root"):
            if key in path:
                path[key] = osp.dirname(path[key])
    return options


class _PlainDumper(yaml.SafeDumper):
    """Writes no anchors and keeps the order of the keys."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    plain = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=plain)


_PlainDumper.add_representer(list, _represent_list)
# text that our loader reads as a number ("1e5") must be quoted
_PlainDumper.add_implicit_resolver(FLOAT_TAG, EXPONENT_FLOAT, list("-+.0123456789"))


def dump(opt: dict[str, Any], path: str | Path) -> None:
    """Writes the resolved options as one self-contained file, with the command line in its header.

    Relative paths stay relative to the working directory, so run the file from the same directory. It may be copied.

    Args:
        opt: ``args.resolved`` of :func:`parse_options`, or its ``opt`` before models have removed ``type``.
        path: The file to write.
    """
    from kdsr import __version__

    command = shlex.join(sys.argv)
    header = "# Resolved options of a run: every piece, override and reference written out.\n"
    header += f"# kdsr {__version__}\n"
    header += f"# Command: {command}\n# Working directory: {os.getcwd()}\n\n".replace("\r", " ")
    body = yaml.dump(user_level(opt), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=110)
    atomic_write(path, lambda file: file.write((header + body).encode()))
