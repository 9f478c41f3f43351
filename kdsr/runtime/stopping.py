"""Stop requests: a signal ends a run after its running iteration, on all ranks at the same one.

A handler only notes the signal. The loop asks :meth:`StopRequest.agreed` after each iteration, saves and stops.
"""

from __future__ import annotations

import contextlib
import difflib
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

from kdsr.runtime.distributed import host_group
from kdsr.runtime.errors import StoppedEarly

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
# What schedulers and people send to end a process in order. SIGKILL and SIGSTOP cannot be handled; the others
# report defects (SIGSEGV), or Python and torch need them for themselves (SIGCHLD).
_POSSIBLE = (*STOP_SIGNALS, "SIGHUP", "SIGQUIT", "SIGXCPU")


def signal_problems(names: Any) -> list[str]:
    """What is wrong with the option ``stop_signals``; each problem begins after the option's name.

    Args:
        names: The option's value; what is not a list is the type check's business.
    """
    problems = []
    for index, name in enumerate(names if isinstance(names, list) else []):
        if name not in _POSSIBLE:
            near = difflib.get_close_matches(str(name).upper(), _POSSIBLE, n=1)
            advice = f"did you mean {near[0]}?" if near else f"possible are {', '.join(_POSSIBLE)}"
            problems.append(f".{index}: {name!r} is no signal that can stop a run in order; {advice}")
    return problems


class StopRequest:
    """Handles stop signals while the ``with`` block lasts; the earlier handlers are put back at its end.

    Until ``training`` is set there is nothing to save: a signal raises :class:`StoppedEarly` at once, SIGINT
    ``KeyboardInterrupt``. From then on the first signal is noted in ``requested`` and said on stderr, and only a
    second SIGINT raises ``KeyboardInterrupt``.

    Outside the main thread, where Python allows no handlers, nothing is handled.

    Args:
        signals: Names of signals, the same on all ranks.
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
            # None: a handler that was not set from Python, which cannot be put back
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
            # Should a destructor swallow it, requested still ends the run after its first iteration.
            raise StoppedEarly(number, name)
        if first:
            again = "; a second SIGINT (Ctrl-C) stops at once" if "SIGINT" in self.signals else ""
            _say(f"kdsr: {name}: finishing the iteration and saving the state{again}")

    def agreed(self) -> str | None:
        """Whether to stop: the name of the signal when any rank was asked, the same on all ranks.

        Collective: every rank calls it the same number of times. It costs one message between the hosts and
        nothing on a GPU.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self.requested
        # One reading, for a signal may come in between.
        requested = self.requested
        asked = torch.tensor([self.signals.index(requested) + 1 if requested else 0])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=host_group())
        # On the host, where a value costs no wait for a GPU.
        return self.signals[int(asked) - 1] if int(asked) else None


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Holds signals back while loading workers start: one that came to them before ``spare_worker`` would end them.

    The workers are born with the signals held, ``spare_worker`` lets them through; here they come at the end of the
    block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _numbers(_POSSIBLE))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spare_worker(worker_id: int = 0) -> None:
    """Lets a loading worker outlive a signal to the whole process group: the main process still needs its batches.

    SIGINT, SIGUSR1 and SIGUSR2 are ignored, and the first SIGTERM, unless the main process has sent it: that is how
    multiprocessing ends its processes, once, before it waits for them. A second SIGTERM ends the worker. Made for
    ``DataLoader``'s ``worker_init_fn``.

    Args:
        worker_id: Not used; ``worker_init_fn`` is given it.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    others = _numbers(_POSSIBLE)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where any SIGTERM ends a worker
        # A Python handler does not learn who has sent a signal, sigwaitinfo() does. The thread inherits the mask.
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
    """A signal to a process that others than our loaders have forked, with our handlers.

    SIGTERM ends it: the process that forked it may have sent it, and wait. The others are for the main process.
    """
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def quiet_when_the_reader_is_gone() -> None:
    """In a loading worker: says nothing when the process that it loads for was killed in the middle of a batch.

    multiprocessing hands tensors over in a thread of the worker, which prints a lost connection as a traceback,
    among the messages that say what has happened.
    """
    told = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        in_thread = threading.current_thread() is not threading.main_thread()
        if not (in_thread and issubclass(kind, ConnectionError | EOFError)):
            told(kind, error, trace)

    sys.excepthook = tell


def _numbers(names: Sequence[str]) -> set[signal.Signals]:
    return {signal.Signals[name] for name in names}


def _say(line: str) -> None:
    # Not print: the handler may have interrupted a print, and a buffered stream cannot be entered twice.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
