"""Checks before a new run renames an existing folder of its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kdsr.distill.weight_files import each_network, weight_files
from kdsr.runtime.errors import OptionError


def refuse_own_files(opt: dict[str, Any]) -> None:
    """Raises an ``OptionError`` if options name files in the run's own folder, which a new run renames."""
    run = Path(opt["path"]["experiments_root"])
    opt = each_network(opt)
    named = {
        f"path.{key}": file
        for key, file in opt["path"].items()
        if key.startswith("pretrain_network") or key == "init_from"
    }
    read = weight_files({**opt, "path": {}})  # network_<key>.path
    named |= {f"network_{key}.path": os.path.expanduser(file) for key, file in read.items()}
    inside = [
        f"{option}: {file} is in the folder of this run, which is renamed at the start; change the name"
        for option, file in named.items()
        if isinstance(file, str) and run in Path(file).absolute().parents
    ]
    if inside:
        raise OptionError(inside)


def refuse_foreign_folder(opt: dict[str, Any]) -> None:
    """Raises an ``OptionError`` if the run's folder exists but is not a run's: a new run would rename it."""
    folder = Path(opt["path"]["log"])
    if opt["path"].get("resume_state") or not os.path.lexists(folder):
        return
    entries = {name for name in os.listdir(folder) if name[0] != "."} if folder.is_dir() else {"a file"}
    logs = any(name.startswith(("train_", "test_")) and name.endswith(".log") for name in entries)
    if entries and not logs and not entries & {"models", "training_states", "visualization", "metrics.csv"}:
        raise OptionError(
            f"name: {folder} exists and is not the folder of a run; this run would rename it; choose another name"
        )
