"""CPU cores available to the processes of a run."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable

from kdsr.runtime.distributed import gather_lists


def workers_warning(per_process: int, cores: Iterable[frozenset[int]]) -> str | None:
    """A warning if a node has more loader processes than cores, else None.

    ``cores`` are, for each training process of the node, those that it may use; ``per_process`` is
    ``num_worker_per_gpu``.
    """
    processes = list(cores)
    available = len(frozenset().union(*processes))
    if per_process * len(processes) <= available:
        return None
    here = f" in each of {len(processes)} processes" if len(processes) > 1 else ""
    most = available // len(processes)
    return (
        f"datasets.train.num_worker_per_gpu: {per_process} loader processes{here}, but this node has {available} CPU "
        f"core{'s' if available > 1 else ''} for the run; more than one per core is rarely faster, set {most}"
        + (" or less" if most else " (images are then loaded in the main process)")
    )


def own_cores() -> frozenset[int]:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return frozenset(affinity(0) if affinity else range(os.cpu_count() or 1))


def cores_of_this_node() -> list[frozenset[int]]:
    """The cores that each process of the run on this node may use. Collective."""
    here = socket.gethostname()
    return [cores for node, cores in gather_lists([(here, own_cores())]) if node == here]
