"""Process groups on CUDA and on the CPU, from torchrun's or Slurm's environment.

Replaces BasicSR's ``init_dist``, which sets a CUDA device unconditionally, ignores ``dist_params`` for the launcher
``pytorch`` and lets two Slurm jobs on one node collide on port 29500.
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

from kdsr.runtime.errors import KdsrError, TrainingError
from kdsr.runtime.launchers import check_backend, explain, take_gpu, to_torch_environment

T = TypeVar("T")
_host_group: dist.ProcessGroup | None = None
_was_rank = False
_timeout: timedelta | None = None  # of every exchange; None: torch's
_LOST = re.compile(
    r"(closed|reset) by peer|broken pipe|connection refused|timed? ?out|remote process exited", re.IGNORECASE
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
    to_torch_environment(launcher, params.get("port"))
    backend = params.get("backend") or "nccl"
    if not torch.cuda.is_available() and backend == "nccl":
        backend = "gloo"  # nccl is what option files written for GPUs name
    check_backend(backend)
    if torch.cuda.is_available():
        take_gpu(backend)
    global _timeout, _was_rank
    limit = params.get("timeout")
    _timeout = None if limit is None else timedelta(seconds=limit)
    try:
        dist.init_process_group(backend, timeout=_timeout)
    except (dist.DistError, RuntimeError) as error:
        raise explain(error, limit) from error
    _was_rank = True
    _never_take_apart(dist.group.WORLD)


def _never_take_apart(group: dist.ProcessGroup | None) -> None:
    """Keeps a group in memory to the end of the process.

    Who drops the last reference to a gloo group, and be it a traceback that held a model in DDP, waits for the group's
    threads with Python's lock in hand; a thread that has yet to give back what its last exchange held wants that
    lock. Both then wait for ever (torch 2.13).
    """
    if group is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


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
        _host_group = dist.new_group(backend="gloo", timeout=_timeout)
        _never_take_apart(_host_group)
    return _host_group


@contextlib.contextmanager
def lost_ranks_told() -> Iterator[None]:
    """Says in one line that another rank is gone; torch's own error ends in the middle of a backward pass.

    Raises:
        TrainingError: In place of the exchange's error.
    """
    try:
        yield
    except RuntimeError as error:
        of_exchange = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not (of_exchange and _LOST.search(str(error))):
            raise
        # gloo's begins with the line of its source and ends with advice
        reason = re.sub(r"^\[\S+\]\s*", "", str(error).splitlines()[0]).split(". This is")[0]
        raise TrainingError(
            f"rank {os.environ.get('RANK', '?')} has lost another rank ({reason}); the first error "
            "of the other ranks says why; --auto_resume goes on from the last state that was saved"
        ) from error


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
