"""Looks at every checkpoint before anything is written."""

from __future__ import annotations

from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from kdsr.models.pretrained import load_pretrained, warm_start
from kdsr.runtime.errors import CheckpointError, KdsrError


def check_checkpoints(opt: dict[str, Any]) -> None:
    """Loads every checkpoint that the options name into its network, and forgets both.

    Costs a second, and means that a file that does not fit is found before the run's folder is made and an older run
    of the same name is put aside.

    Raises:
        CheckpointError: With all the files at fault.
    """
    files = opt["path"]
    named = {
        key[len("network_") :]
        for key, value in opt.items()
        if key.startswith("network_") and isinstance(value, dict)
    }
    wanted = (
        sorted(key for key in named if files.get(f"pretrain_network_{key}")) if opt["is_train"] else ["g"]
    )
    if opt["is_train"] and files.get("init_from"):
        wanted = sorted({*wanted, "g"})
    problems: list[str] = []
    built: dict[str, nn.Module] = {}
    for key in wanted:
        built[key] = _build(opt[f"network_{key}"])
        try:
            load_pretrained(built[key], key, opt)
        except KdsrError as error:
            problems += error.problems
    if opt["is_train"] and not problems and ("t" in built or files.get("init_from") != "teacher"):
        try:
            if "g" in built:
                warm_start(built["g"], opt, built.get("t"))
        except KdsrError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)


def _build(options: dict[str, Any]) -> nn.Module:
    # Not BasicSR's build_network: it opens the log, whose file does not exist yet.
    arguments = {key: value for key, value in options.items() if key != "type"}
    known = dict(iter(ARCH_REGISTRY))
    name = options["type"] if options["type"] in known else f"{options['type']}_basicsr"
    with torch.random.fork_rng():  # initial weights must not depend on whether there was a file to look at
        return known[name](**arguments)
