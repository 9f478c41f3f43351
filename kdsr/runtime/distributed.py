"""Process groups on CUDA and on the CPU, from torchrun's or Slurm's environment.

Replaces BasicSR's ``init_dist``, which sets a CUDA device unconditionally, ignores ``dist_params`` for the launcher
``pytorch`` and lets two Slurm jobs on one node collide on port 29500.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from kdsr.runtime.errors import KdsrError, OptionError, TrainingError

T = TypeVar("T")
_PORTS = range(12000, 32000)  # below the ports that Linux gives to outgoing connections
_host_group: dist.ProcessGroup | None = None
_was_rank = False


def _need(name: str, launcher: str) -> str:
    value = os.environ.get(name)
    if value is None:
        started = "torchrun" if launcher == "pytorch" else "srun"
        raise OptionError(
            f"--launcher {launcher}: the environment variable {name} is not set; start it with {started}"
        )
    return value


def _first_node(nodes: str) -> str:
    """The first name of a Slurm node list: ``rack[2-3,7]node[01-16],login`` begins with ``rack2node01``.

    Done here because ``scontrol`` is not in every container.
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodes)
    if first is None or nodes[first.end() :][:1] not in ("", ","):
        raise OptionError(
            f"--launcher slurm: the node list {nodes!r} cannot be read; set MASTER_ADDR to the first node"
        )
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", first[0])


def _slurm_to_torch_environment(port: int | None) -> None:
    rank, world = _need("SLURM_PROCID", "slurm"), _need("SLURM_NTASKS", "slurm")
    step = os.environ.get("SLURM_STEP_ID")
    if step is None and int(world) > 1:
        raise OptionError(
            f"--launcher slurm: this is one process of a job of {world} tasks; start it with srun, "
            "which starts them all"
        )
    if "MASTER_ADDR" not in os.environ:
        # The step's own nodes: a step need not run on the first node of its job.
        nodes = os.environ.get("SLURM_STEP_NODELIST") or _need("SLURM_NODELIST", "slurm")
        os.environ["MASTER_ADDR"] = _first_node(nodes)
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    elif "MASTER_PORT" not in os.environ:
        # A port of its own for each step of each job, for several may run on a node.
        number = int(os.environ.get("SLURM_JOB_ID", "0")) * 101 + int(step or 0)
        os.environ["MASTER_PORT"] = str(_PORTS[number % len(_PORTS)])
    os.environ.update(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"))


def _check_backend(backend: str) -> None:
    # "nccl" or, for each kind of device, "cpu:gloo,cuda:nccl"
    for name in (part.rpartition(":")[2] for part in backend.split(",")):
        if not dist.is_backend_available(name.lower()):
            raise OptionError(
                f"dist_params.backend: {backend!r} is not available here; possible are nccl and gloo"
            )


def _take_gpu(backend: str) -> None:
    """Makes this process's GPU the current one: the one with its local number, or the only one that it sees."""
    local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # With one GPU per task Slurm shows each task only its own.
    own_alone = visible == 1 and "LOCAL_WORLD_SIZE" not in os.environ
    if "nccl" in backend and local >= visible and not own_alone:
        raise OptionError(
            f"process {local} of node {socket.gethostname()} has no GPU of its own: {visible} are visible; "
            "start one process per GPU, or set num_gpu to 0 for the CPU"
        )
    torch.cuda.set_device(local % visible)


def _explain(error: Exception, limit: float | None) -> OptionError:
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
        "look at the output of the ranks that did not come"
    )


def init_distributed(launcher: str, dist_params: dict[str, Any] | None = None) -> None:
    """Joins the process group.

    Args:
        launcher: ``pytorch`` (torchrun) or ``slurm`` (srun).
        dist_params: ``backend`` (default: nccl with a GPU, else gloo), ``port`` (Slurm only; default: derived from
            the numbers of job and step) and ``timeout``, in seconds, for all ranks to come and for each exchange
            between them (default: torch's, 10 minutes with nccl, 30 with gloo).

    Raises:
        OptionError: When the launcher's environment variables are not there, rank 0's address cannot be resolved,
            its port is taken, the ranks do not all come in time, or a process has no GPU of its own.
    """
    params = dist_params or {}
    if launcher == "slurm":
        _slurm_to_torch_environment(params.get("port"))
    else:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            _need(name, launcher)
    backend = params.get("backend") or "nccl"
    if not torch.cuda.is_available() and backend == "nccl":
        backend = "gloo"  # nccl is what option files written for GPUs name
    _check_backend(backend)
    if torch.cuda.is_available():
        _take_gpu(backend)
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
    except OSError as error:
        raise OptionError(
            f"the address of rank 0, {os.environ['MASTER_ADDR']}, cannot be resolved on {socket.gethostname()} "
            f"({error.strerror}); set MASTER_ADDR to one that every node knows"
        ) from error
    limit = params.get("timeout")
    try:
        dist.init_process_group(backend, timeout=None if limit is None else timedelta(seconds=limit))
    except (dist.DistError, RuntimeError) as error:
        raise _explain(error, limit) from error
    global _was_rank
    _was_rank = True


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def leave_distributed(orderly: bool) -> None:
    """Ends the process group; a process that exits with one open may be aborted by its threads.

    Args:
        orderly: Whether all ranks come here, so that they can wait for each other; after an error they may not.
    """
    global _host_group
    if _joined():
        if orderly:
            dist.barrier()
        dist.destroy_process_group()
        _host_group = None


def host_group() -> dist.ProcessGroup | None:
    """A group that exchanges tensors of the CPU: None, torch's default group, where that is gloo.

    Collective when it is called first. Values that come this way cost no wait for a GPU.
    """
    global _host_group
    if _host_group is None and dist.get_backend() != "gloo":
        _host_group = dist.new_group(backend="gloo")
    return _host_group


def end_rank(code: int) -> int:
    """The last call of a program: ends a process that was a rank here and now; any other gets ``code`` back.

    torch 2.13 aborts about one such process in ten ("terminate called without an active exception") while Python takes
    itself apart, for threads of a process group that DDP still holds. By then all is written, and a good run would be
    reported as failed, a stopped one not as stopped.
    """
    if _was_rank:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
                stream.flush()
        os._exit(code)
    return code


def wrap_ddp(net: nn.Module, device: torch.device, find_unused_parameters: bool = False) -> nn.Module:
    """Wraps a network in DistributedDataParallel, on a GPU or on the CPU; without a process group it stays bare."""
    if not _joined():
        return net
    device_ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        net, device_ids=device_ids, find_unused_parameters=find_unused_parameters
    )


@torch.no_grad()
def share_weights(net: nn.Module) -> None:
    """Gives every rank rank 0's parameters and buffers: each has drawn its own, and copies of them are made next."""
    if _joined():
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, src=0)


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenates every rank's list, in the order of the ranks; every rank gets the whole."""
    if not _joined():
        return items
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items, group=host_group())
    return [item for part in parts for item in part]


def agree_on(error: str | None) -> str | None:
    """Tells every rank what went wrong on one of them: the first rank's error that has one, or None.

    Collective. After work that only some ranks do (files are rank 0's), so that all of them end and none waits.
    """
    return next((found for found in gather_lists([error]) if found is not None), None)


def on_first_rank(do: Callable[[], T]) -> T:
    """Runs ``do`` in rank 0 alone; every rank gets what it returns, or its error.

    Collective. Rank 0 writes the files of a run and looks at its folders, and no rank waits for one that has failed.

    Args:
        do: Returns what can be pickled.

    Raises:
        KdsrError: What ``do`` raised, on all ranks.
    """
    if not _joined():
        return do()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = do()
        except KdsrError as error:
            box[1] = (type(error), error.problems)
    dist.broadcast_object_list(box, src=0, group=host_group())
    if box[1] is not None:
        kind, problems = box[1]
        raise kind(problems)
    return box[0]


@torch.no_grad()
def gather_batches(batch: torch.Tensor) -> torch.Tensor:
    """Concatenates the batches of all ranks along the first dimension, in the order of the ranks.

    Collective, and without gradient: for losses that take their negatives from every rank. The shapes are compared
    on the hosts, which costs no wait for a GPU.

    Args:
        batch: (N, ...), of the same shape on every rank.

    Returns:
        (N × ranks, ...), the same on every rank; ``batch`` without its gradient where there is one rank only.

    Raises:
        TrainingError: On every rank, when the shapes differ.
    """
    if not _joined():
        return batch.detach()
    shapes = gather_lists([tuple(batch.shape)])
    if len(set(shapes)) > 1:
        raise TrainingError(
            f"batches of unequal shapes cannot be gathered: {', '.join(map(str, shapes))} on ranks 0 to "
            f"{len(shapes) - 1}; training batches are equal, so this one was cut after loading"
        )
    parts = [torch.empty_like(batch, memory_format=torch.contiguous_format) for _ in shapes]
    group = host_group() if batch.device.type == "cpu" else None
    dist.all_gather(parts, batch.detach().contiguous(), group=group)
    return torch.cat(parts)
