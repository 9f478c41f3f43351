"""Checks options before anything is built: all problems at once, with the nearest valid names."""

from __future__ import annotations

from typing import Any


def check(opt: dict[str, Any], is_train: bool) -> list[str]:
    """All problems of an option tree at the user's level; empty when it can be run.

    Args:
        opt: As the option file has it, pieces and overrides applied.
        is_train: Training needs ``train``, ``logger`` and a set ``train``; testing only networks and sets.
    """
    problems: list[str] = []
    required = {"name": str, "model_type": str, "datasets": dict, "network_g": dict}
    if is_train:
        required["train"] = dict
    for key, kind in required.items():
        if not isinstance(opt.get(key), kind):
            problems.append(f"{key}: is required" if opt.get(key) is None else f"{key}: {opt[key]!r} is no {kind}")
    return problems
