"""Reads the environment of torchrun and Slurm, and checks it."""

from __future__ import annotations

import math
import os
import re
import socket

import torch
import torch.distributed as dist

from kdsr.runtime.errors import OptionError

_PORTS = range(12000, 32000)  # below the ports that Linux uses for outgoing connections


def _need(name: str, launcher: str) -> str:
    value = os.environ.get(name)
    if value is None:
        started = "torchrun" if launcher == "pytorch" else "srun"
        raise OptionError(
            f"--launcher {launcher}: the environment variable {name} is not set; start it with {started}"
        )
    return value


def whole_number(name: str, lowest: int, below: int | None = None) -> int:
    """The whole number in an environment variable; ``lowest`` if it is not set.

    Raises:
        OptionError: It is no number from ``lowest`` to below ``below``.
    """
    text = os.environ.get(name, str(lowest))
    wanted = f"from {lowest} on" if below is None else f"from {lowest} to {below - 1}"
    if re.fullmatch(r"[0-9]{1,18}", text) is None:  # int() also accepts signs, spaces, underscores
        raise OptionError(
            f"the environment variable {name} is {text!r}, not a whole number {wanted}; launchers set it, "
            "for a run without one unset it"
        )
    if not lowest <= int(text) < (below or math.inf):
        raise OptionError(f"the environment variable {name} is {text}, not a number {wanted}")
    return int(text)


def first_node(nodes: str) -> str:
    """The first name of a Slurm node list: ``rack2node01`` of ``rack[2-3,7]node[01-16],login``.

    Not by ``scontrol``, which many containers do not have.
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodes)
    if first is None or nodes[first.end() :][:1] not in ("", ","):
        raise OptionError(
            f"--launcher slurm: the node list {nodes!r} cannot be read; set MASTER_ADDR to the first node"
        )
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", first[0])


def _slurm_to_torch_environment(port: int | None) -> None:
    rank, world = _need("SLURM_PROCID", "slurm"), _need("SLURM_NTASKS", "slurm")
    tasks = whole_number("SLURM_NTASKS", 1)
    whole_number("SLURM_PROCID", 0, tasks)
    whole_number("SLURM_LOCALID", 0, tasks)
    if "SLURM_STEP_ID" not in os.environ and tasks > 1:
        raise OptionError(
            f"--launcher slurm: this is one process of a job of {world} tasks; start it with srun, "
            "which starts them all"
        )
    if "MASTER_ADDR" not in os.environ:
        # The nodes of the step, which need not include the first node of the job.
        nodes = os.environ.get("SLURM_STEP_NODELIST") or _need("SLURM_NODELIST", "slurm")
        os.environ["MASTER_ADDR"] = first_node(nodes)
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    elif "MASTER_PORT" not in os.environ:
        # A different port for each step of each job, for several may run on one node.
        number = whole_number("SLURM_JOB_ID", 0) * 101 + whole_number("SLURM_STEP_ID", 0)
        os.environ["MASTER_PORT"] = str(_PORTS[number % len(_PORTS)])
    os.environ.update(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"))


def to_torch_environment(launcher: str, port: int | None) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from Slurm's variables; checks torchrun's.

    A ``port`` of None is derived from Slurm's job and step ids.

    Raises:
        OptionError: A variable is missing or invalid, or rank 0's address cannot be resolved.
    """
    if launcher == "slurm":
        _slurm_to_torch_environment(port)
    else:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            _need(name, launcher)
    world = whole_number("WORLD_SIZE", 1)
    whole_number("RANK", 0, world)
    whole_number("LOCAL_RANK", 0, world)
    whole_number("MASTER_PORT", 1, 65536)
    address = os.environ["MASTER_ADDR"]
    if not address.strip():
        raise OptionError(
            "the environment variable MASTER_ADDR is empty; set it to the address of rank 0, or unset it"
        )
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise OptionError(
            f"the address of rank 0, {address}, cannot be resolved on {socket.gethostname()} "
            f"({error.strerror}); set MASTER_ADDR to one that every node can resolve"
        ) from error


def check_backend(backend: str) -> None:
    """Raises an ``OptionError`` for a backend that this torch does not have."""
    # "nccl" or, per device type, "cpu:gloo,cuda:nccl"
    for name in (part.rpartition(":")[2] for part in backend.split(",")):
        if not dist.is_backend_available(name.lower()):
            raise OptionError(
                f"dist_params.backend: {backend!r} is not available here; possible are nccl and gloo"
            )


def select_gpu(backend: str) -> None:
    """Sets the current GPU: the one with the process's local rank, or the only visible one."""
    local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # With one GPU per task, Slurm shows each task only its own.
    only_own = visible == 1 and "LOCAL_WORLD_SIZE" not in os.environ
    if "nccl" in backend and local >= visible and not only_own:
        raise OptionError(
            f"process {local} of node {socket.gethostname()} has no GPU of its own: {visible} are visible; "
            "start one process per GPU, or set num_gpu to 0 for the CPU"
        )
    torch.cuda.set_device(local % visible)


def join_error(error: Exception, limit: float | None) -> OptionError:
    """Explains why a rank could not join the process group within ``limit`` seconds (None: torch's default)."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    reason = str(error).strip().splitlines()[0]
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if "EADDRINUSE" in reason or "address already in use" in reason.lower():
        return OptionError(
            f"port {port} of {address} is taken by another program; choose one with dist_params.port (Slurm) or "
            "--master_port (torchrun)"
        )
    waited = "torch's time limit" if limit is None else f"{limit:g} s (dist_params.timeout)"
    return OptionError(
        f"rank {rank} of {world} could not join the others at {address}, port {port}, within {waited}: {reason}; "
        "see the output of the missing ranks"
    )
