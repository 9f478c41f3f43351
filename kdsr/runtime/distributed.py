"""Process groups on CUDA and on the CPU, from torchrun's or Slurm's environment.

Replaces BasicSR's ``init_dist``, which always sets a CUDA device, ignores ``dist_params`` with the launcher
``pytorch``, and uses port 29500 for every Slurm job, so that two jobs on one node collide.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from kdsr.runtime.declarations import Options, option
from kdsr.runtime.errors import KdsrError, TrainingError
from kdsr.runtime.launchers import check_backend, join_error, select_gpu, to_torch_environment

T = TypeVar("T")
_host_group: dist.ProcessGroup | None = None
_was_rank = False
_timeout: timedelta | None = None  # of every collective; None: torch's default
_LOST = re.compile(
    r"(closed|reset) by peer|broken pipe|connection refused|timed? ?out|remote process exited", re.IGNORECASE
)


class DistOptions(Options):
    backend: str = option(None, "Backend of the process group.", shown_default="nccl with a GPU, else gloo")
    port: int | None = option(
        None,
        "Port of the first process; for Slurm only.",
        lowest=1,
        highest=65535,
        shown_default="from the numbers of job and step",
    )
    timeout: float | None = option(
        None,
        "Seconds that the processes wait for each other, at the start and in every exchange.",
        lowest=1,
        shown_default="600 with nccl, 1800 with gloo",
    )


def init_distributed(launcher: str, dist_params: dict[str, Any] | None = None) -> None:
    """Joins the process group.

    Args:
        launcher: ``pytorch`` (torchrun) or ``slurm`` (srun).
        dist_params: See ``DistOptions``.

    Raises:
        OptionError: The launcher's environment variables are missing, rank 0's address cannot be resolved, its
            port is taken, not all ranks join in time, or a process has no GPU of its own.
    """
    params = DistOptions.read(dist_params)
    to_torch_environment(launcher, params.port)
    backend = params.backend or "nccl"
    if not torch.cuda.is_available() and backend == "nccl":
        backend = "gloo"  # option files written for GPUs name nccl
    check_backend(backend)
    if torch.cuda.is_available():
        select_gpu(backend)
    global _timeout, _was_rank
    limit = params.timeout
    _timeout = None if limit is None else timedelta(seconds=limit)
    try:
        dist.init_process_group(backend, timeout=_timeout)
    except (dist.DistError, RuntimeError) as error:
        raise join_error(error, limit) from error
    _was_rank = True
    _keep_alive(dist.group.WORLD)


def _keep_alive(group: dist.ProcessGroup | None) -> None:
    """Keeps a group in memory until the process ends.

    Destroying a gloo group can deadlock (torch 2.13): the destructor joins the group's threads while it holds the
    GIL, and such a thread needs the GIL to release the tensors of its last collective.
    """
    if group is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def is_joined() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def leave_distributed(wait: bool) -> None:
    """Destroys the process group; the threads of an open one may abort the process at exit.

    ``wait`` waits for all ranks first: not after an error, which other ranks may not have had.
    """
    global _host_group
    if is_joined():
        if wait:
            dist.barrier()
        dist.destroy_process_group()
        _host_group = None


def host_group() -> dist.ProcessGroup | None:
    """A gloo group for CPU tensors; None, torch's default group, if that is gloo.

    The first call is collective. Collectives on this group do not synchronise with the GPU.
    """
    global _host_group
    if _host_group is None and dist.get_backend() != "gloo":
        _host_group = dist.new_group(backend="gloo", timeout=_timeout)
        _keep_alive(_host_group)
    return _host_group


@contextlib.contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Turns the error of a collective whose other rank has gone into a ``TrainingError`` of one line."""
    try:
        yield
    except RuntimeError as error:
        collective = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not (collective and _LOST.search(str(error))):
            raise
        # gloo's message begins with its source line and ends with advice
        reason = re.sub(r"^\[\S+\]\s*", "", str(error).splitlines()[0]).split(". This is")[0]
        raise TrainingError(
            f"rank {os.environ.get('RANK', '?')} has lost another rank ({reason}); see the first error of the other "
            "ranks for the cause; --auto_resume continues from the last saved state"
        ) from error


def exit_rank(code: int) -> int:
    """The last call of a program: exits at once in a process that was a rank, else returns ``code``.

    torch 2.13 aborts about one such process in ten ("terminate called without an active exception") while Python
    finalises, because DDP still refers to a process group with running threads. A successful run would then be reported
    as failed.
    """
    if _was_rank:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed stream or broken pipe
                stream.flush()
        os._exit(code)
    return code


def wrap_ddp(net: nn.Module, device: torch.device, find_unused_parameters: bool = False) -> nn.Module:
    """Wraps a network in DistributedDataParallel on a GPU or CPU; without a process group returns it unchanged."""
    if not is_joined():
        return net
    device_ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        net, device_ids=device_ids, find_unused_parameters=find_unused_parameters
    )


def without_reduction(net: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it, gradients of a network from ``wrap_ddp`` are added up on each rank alone."""
    return net.no_sync() if isinstance(net, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


@torch.no_grad()
def share_weights(net: nn.Module) -> None:
    """Broadcasts rank 0's parameters and buffers, before copies of them are made."""
    if is_joined():
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, src=0)


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenates the lists of all ranks, in rank order, on every rank."""
    if not is_joined():
        return items
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items, group=host_group())
    return [item for part in parts for item in part]


def on_first_rank(function: Callable[[], T]) -> T:
    """Runs a function on rank 0 only; every rank gets its return value or its error.

    Collective. For access to the run's files: no rank waits for a rank 0 that has failed.

    Args:
        function: Its return value must be picklable.

    Raises:
        KdsrError: The function's, on all ranks.
    """
    if not is_joined():
        return function()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except KdsrError as error:
            box[1] = (type(error), error.problems)
    dist.broadcast_object_list(box, src=0, group=host_group())
    if box[1] is not None:
        kind, problems = box[1]
        raise kind(problems)
    return box[0]


@torch.no_grad()
def gather_batches(batch: torch.Tensor) -> torch.Tensor:
    """Concatenates the batches of all ranks along the first dimension, in rank order, without gradient.

    Collective. For losses that take negatives from every rank. The shapes are compared on the CPU, without a GPU sync.

    Args:
        batch: (N, ...), of the same shape on every rank.

    Returns:
        (N × ranks, ...), the same on every rank; the detached ``batch`` with one rank.

    Raises:
        TrainingError: On every rank, if the shapes differ.
    """
    if not is_joined():
        return batch.detach()
    shapes = gather_lists([tuple(batch.shape)])
    if len(set(shapes)) > 1:
        raise TrainingError(
            f"batches of unequal shapes cannot be gathered: {', '.join(map(str, shapes))} on ranks 0 to "
            f"{len(shapes) - 1}; loaded batches are equal, so this one was cut after loading"
        )
    parts = [torch.empty_like(batch, memory_format=torch.contiguous_format) for _ in shapes]
    group = host_group() if batch.device.type == "cpu" else None
    dist.all_gather(parts, batch.detach().contiguous(), group=group)
    return torch.cat(parts)
