"""Lives of a training: real processes, started, killed and started again, and what they leave compared bit by bit.

Importing kdsr takes seconds, so lives are forked from a server that has imported it and done nothing else. A life is
an ordinary process all the same: it calls ``kdsr.train.main`` in its own folder, its loader workers are forked from
it, and SIGKILL takes it as it takes any other.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

START, STEP, SAVE, VALIDATION, END = range(5)
PHASES = ("before the first step", "in a step", "in the save", "in validation", "after the last step")
POLL = 0.0003  # seconds between two looks at a life

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["kdsr.train", "kdsr.pipeline.seam"])


class Life:
    """One process that trains in ``folder``; what it prints goes to ``folder/life.log``.

    Args:
        folder: Its working directory.
        argv: Arguments of ``kdsr/train.py``.
        memory: Bytes of address space that it may take; unlimited where None.
        rank: ``(rank, number of processes, port)`` of one of several processes that train together.
        prepare: Called in the process before the training (a function of a module).
    """

    def __init__(
        self,
        folder: Path,
        argv: list[str],
        memory: int | None = None,
        rank: tuple[int, int, int] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.log = folder / ("life.log" if rank is None else f"life_{rank[0]}.log")
        self._seen = _context.RawArray("q", 2)  # phase, iteration
        self.process = _context.Process(
            target=_live, args=(str(folder), argv, str(self.log), self._seen, memory, rank, prepare)
        )
        self.process.start()
        self.started = time.monotonic()

    @property
    def phase(self) -> int:
        return self._seen[0]

    @property
    def iteration(self) -> int:
        """The iteration that is running; 0 before the loop begins."""
        return self._seen[1]

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def wait_until(self, condition: Callable[[Life], bool], limit: float = 120) -> bool:
        """Waits for a moment of the life; False when it ended without it."""
        deadline = time.monotonic() + limit
        while not condition(self):
            if not self.process.is_alive():
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"waited {limit} s for a moment that did not come; see {self.log}")
            time.sleep(POLL)
        return True

    def kill(self, workers: bool = True) -> bool:
        """SIGKILL to the process, then to its workers (unless they are to see it alone); whether it was alive."""
        pid = self.process.pid
        assert pid is not None
        hit = self.process.is_alive()
        if hit:
            os.kill(pid, signal.SIGKILL)
        self.process.join()
        if workers:
            self._end_workers()
        return hit and self.process.exitcode == -signal.SIGKILL

    @contextmanager
    def held(self) -> Iterator[None]:
        """The process stands still for the time of a ``with`` block."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def finish(self, limit: float = 240) -> int:
        """Waits for the end and gives the exit code."""
        self.process.join(limit)
        if self.process.is_alive():
            self.kill()
            raise TimeoutError(f"still running after {limit} s; see {self.log}")
        self._end_workers()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def workers(self) -> list[int]:
        """Processes that it has started and that still run."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has just ended
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                pid = int(stat.parent.name)
                if int(group) == self.process.pid != pid and state != "Z":
                    found.append(pid)
        return found

    def _end_workers(self) -> None:
        assert self.process.pid
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group: see _live


def _live(
    folder: str,
    argv: list[str],
    log: str,
    seen: Any,
    memory: int | None,
    rank: tuple[int, int, int] | None,
    prepare: Callable[[], None] | None,
) -> None:
    os.setpgid(0, 0)
    if rank is not None:  # as torchrun does it
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        numbers = (rank[0], rank[0], rank[1], rank[1], rank[2])
        os.environ.update({name: str(number) for name, number in zip(names, numbers, strict=True)})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  as a process of its own would have them
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    multiprocessing.set_start_method("fork", force=True)  # the default, which loaders take
    torch.set_num_threads(1)
    from kdsr import train

    _watch(seen)
    if prepare is not None:
        prepare()
    sys.exit(train.main(argv))


def _watch(seen: Any) -> None:
    """Lets the loop's calls leave a mark of where they are; they do what they did."""
    from kdsr.models.checkpointer import Checkpointer
    from kdsr.models.kd_model import KDModel
    from kdsr.models.validator import Validator
    from kdsr.models.vqgan_model import VQGANModel
    from kdsr.pipeline.progress import ProgressMessageLogger

    started = ProgressMessageLogger.__init__
    running = []

    def start(self: Any, *arguments: Any) -> None:
        started(self, *arguments)
        running.append(True)

    def step(feed: Callable[..., None]) -> Callable[..., None]:
        def watched(self: Any, data: Any) -> None:
            if running:  # not the rehearsal
                seen[0], seen[1] = STEP, self.guard.iteration + 1
            feed(self, data)

        return watched

    def within(phase: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            before = seen[0]
            seen[0] = phase
            try:
                return call(*arguments, **named)
            finally:
                seen[0] = before

        return watched

    ProgressMessageLogger.__init__ = start  # type: ignore[method-assign]
    KDModel.feed_data = step(KDModel.feed_data)  # type: ignore[method-assign]
    VQGANModel.feed_data = step(VQGANModel.feed_data)  # type: ignore[method-assign]
    Checkpointer.save = within(SAVE, Checkpointer.save)  # type: ignore[method-assign]
    Checkpointer.save_weights = within(SAVE, Checkpointer.save_weights)  # type: ignore[method-assign]
    Validator.validate = within(VALIDATION, Validator.validate)  # type: ignore[method-assign]


def train(folder: Path, argv: list[str]) -> int:
    """A whole life, from its start to its own end; gives the exit code."""
    return Life(folder, argv).finish()


def newest(run: Path) -> int:
    """Iteration of the newest state of a run's folder; 0 without one."""
    return max((int(path.stem) for path in run.glob("training_states/*.state")), default=0)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: the last state, the students' files, ``metrics.csv``.

    Tensors are compared bit by bit, everything else of a state by value, ``metrics.csv`` byte by byte.
    """
    found = []
    last = newest(one), newest(other)
    if last[0] != last[1]:
        return [f"the last states are {last[0]} and {last[1]}"]
    pairs = [f"training_states/{last[0]}.state", "models/net_g_latest.pth"]
    names = [{path.name for path in run.glob("models/net_g_*.pth")} for run in (one, other)]
    pairs += [f"models/{name}" for name in sorted(names[0] & names[1])]
    for file in dict.fromkeys(pairs):
        contents = [torch.load(run / file, weights_only=True) for run in (one, other)]
        found += [f"{file}: {difference}" for difference in unlike(*contents)]
    if (one / "metrics.csv").read_bytes() != (other / "metrics.csv").read_bytes():
        found.append("metrics.csv")
    return found


def unlike(one: Any, other: Any) -> list[str]:
    """Places at which two trees of tensors and plain values differ."""
    return list(_unlike(one, other, ""))


def _unlike(one: Any, other: Any, place: str) -> Iterator[str]:
    both_sections = isinstance(one, dict) and isinstance(other, dict)  # a Counter goes on as a dict
    if type(one) is not type(other) and not both_sections:
        yield f"{place}: {type(one).__name__} and {type(other).__name__}"
    elif isinstance(one, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        if not alike or not np.array_equal(_bits(one), _bits(other)):
            yield f"{place}: other bits"
    elif isinstance(one, dict):
        if list(one) != list(other):
            yield f"{place}: keys {list(one)} and {list(other)}"
        for key in one.keys() & other.keys():
            yield from _unlike(one[key], other[key], f"{place}.{key}" if place else str(key))
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{place}: {len(one)} and {len(other)} entries"
        for index, (first, second) in enumerate(zip(one, other, strict=False)):
            yield from _unlike(first, second, f"{place}.{index}")
    elif one != other and not (one != one and other != other):
        yield f"{place}: {one!r} and {other!r}"


def _bits(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), np.uint8
    )
