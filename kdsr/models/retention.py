"""Which checkpoints of a run stay on the disk."""

from __future__ import annotations

import re
from pathlib import Path

_WEIGHTS = re.compile(r"net_\w+?_(\d+)\.(?:pth|safetensors)")


def drop_old(
    models: Path, states: Path, keep_last: int | None, current_iter: int, spare: int | None = None
) -> None:
    """Removes the states, and the weights with them, that are older than the newest ``keep_last``.

    Args:
        models: Folder of ``net_X_N.pth`` (and ``.safetensors``); ``latest`` and ``best`` have no number and stay.
        states: Folder of ``N.state``.
        keep_last: How many iterations stay; None or 0: all.
        current_iter: The one that was just saved. Later ones are not this run's past and stay.
        spare: The iteration that this process was resumed from; it stays.
    """
    if not keep_last:
        return
    saved = {int(file.stem): file for file in states.glob("*.state") if file.stem.isdecimal()}
    past = sorted(iteration for iteration in saved if iteration <= current_iter)
    kept = {*past[-keep_last:], spare}
    for iteration in past:
        if iteration not in kept:
            saved[iteration].unlink(missing_ok=True)  # the state first: none may name weights that are gone
    for file in models.iterdir():
        number = _WEIGHTS.fullmatch(file.name)
        if number and int(number[1]) <= current_iter and int(number[1]) not in kept:
            file.unlink(missing_ok=True)
