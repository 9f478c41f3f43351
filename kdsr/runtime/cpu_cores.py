"""The CPU cores that the processes of a run share."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable

from kdsr.runtime.distributed import gather_lists


def workers_warning(per_process: int, cores: Iterable[frozenset[int]]) -> str | None:
    """A warning when the loading processes of a node are more than its cores.

    Args:
        per_process: ``num_worker_per_gpu``.
        cores: The cores that each training process of the node may use.
    """
    places = list(cores)
    available, asked = len(frozenset().union(*places)), per_process * len(places)
    if asked <= available:
        return None
    here = f" in each of {len(places)} processes" if len(places) > 1 else ""
    most = available // len(places)
    return (
        f"datasets.train.num_worker_per_gpu: {per_process} loading processes{here}, but this node has {available} CPU "
        f"core{'s' if available > 1 else ''} for the run; more than one per core is rarely faster, set {most}"
        + (" or less" if most else " (images are then loaded in the main process)")
    )


def cores_of_this_node() -> list[frozenset[int]]:
    """The cores that each process of the run on this node may use. Collective."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    own = frozenset(affinity(0) if affinity else range(os.cpu_count() or 1))
    return [
        cores for node, cores in gather_lists([(socket.gethostname(), own)]) if node == socket.gethostname()
    ]
