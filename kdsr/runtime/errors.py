"""Errors that a user can fix, each with its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool

_LONGEST = 2000  # characters of a printed message


class KdsrError(Exception):
    """Base of the errors that are printed without a traceback, one line for each of ``problems``."""

    exit_code = 1
    label = "kdsr: error"

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class OptionError(KdsrError):
    """The options are wrong. Raised before anything is written."""

    exit_code = 2


class CheckpointError(KdsrError):
    """A checkpoint is missing, unreadable or does not fit its network."""

    exit_code = 2


class DataError(KdsrError):
    """An image or a data set is missing, unreadable or of the wrong size."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        if isinstance(problems, str) and "Original Traceback" in problems:
            # DataLoader re-raises a worker's error with the worker's traceback as its message.
            problems = problems.rsplit(f"{type(self).__name__}: ", 1)[-1].strip()
        super().__init__(problems)


class TrainingError(KdsrError):
    """A run cannot continue."""


class Stopped(KdsrError):
    """A run was stopped by a signal and has saved its state; the same command with --auto_resume continues it.

    The exit code is sysexits' EX_TEMPFAIL: a scheduler may restart the run.
    """

    exit_code = 75
    label = "kdsr"


class StoppedEarly(BaseException):
    """This rank was stopped by a signal before the first iteration, when there was nothing to save.

    Not an ``Exception``, so that handlers for damaged files do not catch it and skip the newest state.
    """

    def __init__(self, number: int, name: str) -> None:
        super().__init__(f"stopped by {name} before the first iteration; there was nothing to save yet")
        self.exit_code = 128 + number  # as a shell reports it: not for a restart


def _system_problem(error: OSError) -> str:
    """The files and the system's reason; without them the error's last line."""
    # DataLoader re-raises a worker's error with the worker's traceback as its message.
    lines = str(error).strip().splitlines()
    reason = error.strerror or (lines[-1] if lines else type(error).__name__)
    files = [str(file) for file in (error.filename, error.filename2) if file is not None]
    return f"{' -> '.join(files)}: {reason}" if files else reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the machine or its GPU is out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch raises a plain RuntimeError on the CPU
    return any(phrase in str(error) for phrase in ("can't allocate memory", "not enough memory"))


def _printable(problem: str) -> str:
    """A message, which may quote files: control characters are escaped and long text is cut."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in problem[:_LONGEST])
    return shown if len(problem) <= _LONGEST else f"{shown} ..."


def error_line(problem: str, label: str = KdsrError.label) -> str:
    """The line by which a problem is printed."""
    return f"{label}: {_printable(problem)}"


def report_errors(run: Callable[[], None]) -> int:
    """Runs ``run`` and prints errors that a user can fix without a traceback.

    These are kdsr's own, the system's (disk full, no permission, a file in place of a folder), out of memory, a
    killed worker process and an interrupt (Ctrl-C).

    Returns:
        The exit code: 0, the error's, or 130 after an interrupt.
    """
    label = KdsrError.label
    try:
        run()
    except KdsrError as error:
        problems, exit_code, label = error.problems, error.exit_code, error.label
    except StoppedEarly as stop:
        problems, exit_code, label = [str(stop)], stop.exit_code, Stopped.label
    except KeyboardInterrupt:
        problems, exit_code, label = ["interrupted"], 130, Stopped.label
    except OSError as error:
        problems, exit_code = [_system_problem(error)], 1
    except BrokenProcessPool:
        problems, exit_code = ["a worker process was killed (out of memory?); use fewer --workers"], 1
    except (MemoryError, RuntimeError) as error:
        message = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        if is_out_of_memory(error):
            message = f"out of memory ({message}); use smaller batches, patches or networks"
        elif message.startswith("DataLoader worker"):
            message = f"{message}; out of memory? Use fewer num_worker_per_gpu"
        else:
            raise
        problems, exit_code = [message], 1
    else:
        return 0
    for problem in problems:
        print(error_line(problem, label), file=sys.stderr, flush=True)
    return exit_code
