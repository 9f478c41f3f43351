"""Runs of several processes on the CPU, as torchrun starts them, without paying for an import of torch in each."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["kdsr.train", "kdsr.pipeline.seam"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder: Path, argv: list[str], ranks: int = 2, prepare: Any = None) -> list[Any]:
    """Starts ``kdsr/train.py argv`` in ``ranks`` processes; what rank r prints goes to ``folder/rank_r.log``.

    Args:
        folder: Their working directory.
        argv: Arguments beside the launcher's.
        ranks: Number of processes.
        prepare: Called with the rank in each process before the training (a function of a module).
    """
    port = free_port()
    processes = [
        _context.Process(target=_rank, args=(str(folder), argv, rank, ranks, port, prepare))
        for rank in range(ranks)
    ]
    for rank, process in enumerate(processes):
        process.start()
        process.log = folder / f"rank_{rank}.log"
    return processes


def finish(processes: list[Any], limit: float = 120) -> list[int]:
    """Waits for the ends and gives the exit codes.

    A process that hangs is killed and fails the test, with the stacks of its threads, which go to its rank's log.
    """
    deadline = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        os.kill(process.pid, signal.SIGQUIT)  # see _rank
    if hanging:
        time.sleep(1)
    for process in hanging:
        process.kill()
        process.join()
    message = "\n".join(f"--- {process.log}\n{process.log.read_text()[-8000:]}" for process in hanging)
    assert not hanging, f"{len(hanging)} of {len(processes)} processes still ran after {limit} s\n{message}"
    return [process.exitcode for process in processes]


def run(folder: Path, argv: list[str], ranks: int = 2, prepare: Any = None) -> list[int]:
    return finish(start(folder, argv, ranks, prepare))


def _rank(folder: str, argv: list[str], rank: int, ranks: int, port: int, prepare: Any) -> None:
    os.chdir(folder)
    output = os.open(f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  as a process of its own would have them
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.register(signal.SIGQUIT, file=sys.stderr, all_threads=True)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # the default, which loaders take
    from kdsr import train

    if prepare is not None:
        prepare(rank)
    sys.exit(train.main([*argv, "--launcher", "pytorch"]))
