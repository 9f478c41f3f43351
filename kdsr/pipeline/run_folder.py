"""What a new run does not do: read files out of a folder that it moves aside, or move one that no run has made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kdsr.distill.weight_files import weight_files
from kdsr.runtime.errors import OptionError


def refuse_own_files(opt: dict[str, Any]) -> None:
    """Refuses to start from files in the run's own folder, which a new run of that name moves aside.

    Raises:
        OptionError: Naming the options.
    """
    run = Path(opt["path"]["experiments_root"])
    named = {
        f"path.{key}": file
        for key, file in opt["path"].items()
        if key.startswith("pretrain_network") or key == "init_from"
    }
    read = weight_files({**opt, "path": {}})  # by the networks themselves
    named |= {f"network_{key}.path": os.path.expanduser(file) for key, file in read.items()}
    inside = [
        f"{option}: {file} lies in the folder of this very run, which is moved aside at the start; change the name"
        for option, file in named.items()
        if isinstance(file, str) and run in Path(file).absolute().parents
    ]
    if inside:
        raise OptionError(inside)


def refuse_to_move(opt: dict[str, Any]) -> None:
    """Refuses a name whose folder is there and was made by no run: a new run of that name moves the folder aside.

    Raises:
        OptionError: Naming the folder.
    """
    folder = Path(opt["path"]["log"])
    if opt["path"].get("resume_state") or not os.path.lexists(folder):
        return
    entries = {name for name in os.listdir(folder) if name[0] != "."} if folder.is_dir() else {"a file"}
    logs = any(name.startswith(("train_", "test_")) and name.endswith(".log") for name in entries)
    if entries and not logs and not entries & {"models", "training_states", "visualization", "metrics.csv"}:
        raise OptionError(
            f"name: {folder} is there already and is not the folder of a run, and this run would move it aside; "
            "choose another name"
        )
