"""Process groups on CUDA and on the CPU, from torchrun's or Slurm's environment.

Replaces BasicSR's ``init_dist``, which sets a CUDA device unconditionally, ignores ``dist_params`` for the launcher
``pytorch`` and lets two Slurm jobs on one node collide on port 29500.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kdsr.runtime.errors import OptionError


def _need(name: str, launcher: str) -> str:
    value = os.environ.get(name)
    if value is None:
        started = "torchrun" if launcher == "pytorch" else "srun"
        raise OptionError(
            f"--launcher {launcher}: the environment variable {name} is not set; start it with {started}"
        )
    return value


def _slurm_to_torch_environment(port: int | None) -> None:
    rank, world = _need("SLURM_PROCID", "slurm"), _need("SLURM_NTASKS", "slurm")
    if "MASTER_ADDR" not in os.environ:
        nodes = _need("SLURM_NODELIST", "slurm")
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        os.environ["MASTER_ADDR"] = names.stdout.split()[0]
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    elif "MASTER_PORT" not in os.environ:
        # One port per job, so that two jobs on a node do not meet.
        os.environ["MASTER_PORT"] = str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000)
    os.environ.update(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"))


def init_distributed(launcher: str, dist_params: dict[str, Any] | None = None) -> None:
    """Joins the process group.

    Args:
        launcher: ``pytorch`` (torchrun) or ``slurm`` (srun).
        dist_params: ``backend`` (default: nccl with a GPU, else gloo) and ``port`` (Slurm only; default: derived from
            the job's id).

    Raises:
        OptionError: When the launcher's environment variables are not there.
    """
    params = dist_params or {}
    if launcher == "slurm":
        _slurm_to_torch_environment(params.get("port"))
    else:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            _need(name, launcher)
    backend = params.get("backend", "nccl")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    elif backend == "nccl":
        backend = "gloo"  # nccl is what option files written for GPUs name
    dist.init_process_group(backend)


def leave_distributed(orderly: bool) -> None:
    """Ends the process group; a process that exits with one open may be aborted by its threads.

    Args:
        orderly: Whether all ranks come here, so that they can wait for each other; after an error they may not.
    """
    if dist.is_available() and dist.is_initialized():
        if orderly:
            dist.barrier()
        dist.destroy_process_group()


def wrap_ddp(net: nn.Module, device: torch.device, find_unused_parameters: bool = False) -> nn.Module:
    """Wraps a network in DistributedDataParallel, on a GPU or on the CPU; without a process group it stays bare."""
    if not (dist.is_available() and dist.is_initialized()):
        return net
    device_ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        net, device_ids=device_ids, find_unused_parameters=find_unused_parameters
    )


@torch.no_grad()
def share_weights(net: nn.Module) -> None:
    """Gives every rank rank 0's parameters and buffers: each has drawn its own, and copies of them are made next."""
    if dist.is_available() and dist.is_initialized():
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, src=0)


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenates every rank's list, in the order of the ranks; every rank gets the whole."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
