"""Stop signals: a run ends after the current iteration, on all ranks after the same one.

A handler only records the signal. The loop calls :meth:`StopRequest.agreed` after each iteration, saves and stops.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from kdsr.runtime.distributed import host_group, is_joined
from kdsr.runtime.errors import StoppedEarly
from kdsr.runtime.suggestions import nearest

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
# SIGKILL and SIGSTOP cannot be handled; the others report crashes (SIGSEGV) or are used by Python and torch (SIGCHLD).
_POSSIBLE = (*STOP_SIGNALS, "SIGHUP", "SIGQUIT", "SIGXCPU")


def signal_problems(names: Any) -> list[str]:
    """Problems with the value of the option ``stop_signals``, each to be appended to the option's name.

    The type check reports a value that is not a list.
    """
    return [
        f".{index}: {name!r} is not a signal that can stop a run; {nearest(str(name), _POSSIBLE)}"
        for index, name in enumerate(names if isinstance(names, list) else [])
        if name not in _POSSIBLE
    ]


class StopRequest:
    """Handles stop signals inside the ``with`` block and restores the earlier handlers at its end.

    Until ``training`` is set there is nothing to save: a signal raises :class:`StoppedEarly`, SIGINT
    ``KeyboardInterrupt``. Afterwards the first signal is recorded in ``requested`` and printed to stderr, and only a
    second SIGINT raises ``KeyboardInterrupt``. The signals must be the same on all ranks.

    Does nothing outside the main thread, where Python allows no handlers.
    """

    def __init__(self, signals: Sequence[str] = STOP_SIGNALS) -> None:
        self.signals = tuple(signals)
        self.training = False
        self.requested: str | None = None
        self._interrupts = 0
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in self.signals:
                number = signal.Signals[name]
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python and cannot be restored
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return _in_other_process(number)
        name = signal.Signals(number).name
        self._interrupts += name == "SIGINT"
        first, self.requested = self.requested is None, self.requested or name
        if self._interrupts > 1 or (name == "SIGINT" and not self.training):
            raise KeyboardInterrupt
        if not self.training:
            # If a destructor swallows it, ``requested`` still ends the run after its first iteration.
            raise StoppedEarly(number, name)
        if first:
            again = "; a second SIGINT (Ctrl-C) stops at once" if "SIGINT" in self.signals else ""
            _print(f"kdsr: {name}: finishing the iteration and saving the state{again}")

    def agreed(self) -> str | None:
        """The name of the signal if any rank has received one, the same on all ranks; else None.

        Collective. Costs one message between the hosts and no GPU synchronisation.
        """
        if not is_joined():
            return self.requested
        # Read once: a signal may arrive in between.
        requested = self.requested
        asked = torch.tensor([self.signals.index(requested) + 1 if requested else 0])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=host_group())
        return self.signals[int(asked) - 1] if int(asked) else None


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Blocks signals while loader workers start, so that none ends a worker before ``ignore_stop_signals`` runs.

    The workers inherit the mask and unblock the signals in ``ignore_stop_signals``.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _numbers(_POSSIBLE))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(_worker_id: int = 0) -> None:
    """Keeps a loader worker alive after a signal to the whole process group: the run still needs its batches.

    Ignores SIGINT, SIGUSR1, SIGUSR2 and the first SIGTERM, unless the main process has sent it (multiprocessing does
    so once to end a worker). A second SIGTERM ends the worker.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    others = _numbers(_POSSIBLE)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where any SIGTERM ends a worker
        # Unlike a handler, sigwaitinfo() returns the sender. The thread inherits the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        main = multiprocessing.parent_process()
        pid = os.getppid() if main is None else main.pid
        threading.Thread(target=_wait_for_sigterm, args=(pid,), daemon=True).start()
        others.discard(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, others)


def _wait_for_sigterm(main: int | None) -> None:
    for _ in range(2):
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == main:
            os._exit(0)  # as torch's own handler does
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


def _in_other_process(number: int) -> None:
    """Handles a signal in a forked process that inherited the handlers but is not a loader worker.

    SIGTERM ends it, for its parent may wait for that. Other signals are left to the main process.
    """
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def hide_lost_connections() -> None:
    """Hides, in a loader worker, the traceback of its thread that sends tensors when the main process was killed."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        in_thread = threading.current_thread() is not threading.main_thread()
        if not (in_thread and issubclass(kind, ConnectionError | EOFError)):
            previous(kind, error, trace)

    sys.excepthook = hook


def _numbers(names: Sequence[str]) -> set[signal.Signals]:
    return {signal.Signals[name] for name in names}


def _print(line: str) -> None:
    # Not print(): a signal handler may interrupt one, and buffered streams are not reentrant.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
