"""The environment variables that launchers set."""

from __future__ import annotations

import os
import socket


def slurm_step(job: int, step: int, nodes: str = "localhost", rank: int = 0, world: int = 1) -> None:
    """The variables that srun gives a task."""
    os.environ.update(
        SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step), SLURM_NODELIST="elsewhere", SLURM_STEP_NODELIST=nodes,
        SLURM_PROCID=str(rank), SLURM_LOCALID="0", SLURM_NTASKS=str(world),
    )  # fmt: skip


def torch_environment(rank: int, world: int, address: str, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR=address, MASTER_PORT=str(port))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
