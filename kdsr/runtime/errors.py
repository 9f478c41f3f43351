"""Errors that a user can mend, each with the exit code of the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool

_LONGEST = 2000  # characters of a printed message


class KdsrError(Exception):
    """Base of all errors that kdsr explains in one or two lines.

    Args:
        problems: One message, or several that were found together (shown one per line).
    """

    exit_code = 1
    label = "kdsr: error"

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class OptionError(KdsrError):
    """The options cannot be run as they stand. Nothing has been written when it is raised."""

    exit_code = 2


class CheckpointError(KdsrError):
    """A checkpoint is missing, unreadable or does not fit its network."""

    exit_code = 2


class DataError(KdsrError):
    """An image or a data set is missing, unreadable or of the wrong size."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        if isinstance(problems, str) and "Original Traceback" in problems:
            # DataLoader raises a worker's error again with the worker's traceback as its message.
            problems = problems.rsplit(f"{type(self).__name__}: ", 1)[-1].strip()
        super().__init__(problems)


class TrainingError(KdsrError):
    """A run cannot go on."""


class Stopped(KdsrError):
    """A run was asked to stop and did, with its state saved; the same command goes on from there.

    The exit code is sysexits' EX_TEMPFAIL: what started the run may start it again.
    """

    exit_code = 75
    label = "kdsr"


class StoppedEarly(BaseException):
    """A run was asked to stop before its first iteration, when there was nothing to save; of this rank alone.

    No ``Exception``: what turns those into the damaged file or the wrong option that they mean must let it pass, or
    the newest state would be skipped for it.

    Args:
        number: Of the signal.
        name: Of the signal.
    """

    def __init__(self, number: int, name: str) -> None:
        super().__init__(f"stopped by {name} before the first iteration; there was nothing to save yet")
        self.exit_code = 128 + number  # as a shell reports it: who starts the run again gains nothing


def _system_problem(error: OSError) -> str:
    """Names the file and the system's reason; an error that carries neither speaks for itself."""
    # DataLoader raises a worker's error again with the worker's traceback as its message.
    lines = str(error).strip().splitlines()
    reason = error.strerror or (lines[-1] if lines else type(error).__name__)
    files = [str(file) for file in (error.filename, error.filename2) if file is not None]
    return f"{' -> '.join(files)}: {reason}" if files else reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine, or its GPU, has no more memory."""
    said = ("can't allocate memory", "not enough memory")  # torch's on a CPU is a plain RuntimeError
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(words in str(error) for words in said)


def _printable(problem: str) -> str:
    """A message with names and values out of files: control characters are shown, and what has no end gets one."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in problem[:_LONGEST])
    return shown if len(problem) <= _LONGEST else f"{shown} ..."


def reported(run: Callable[[], None]) -> int:
    """Runs ``run``; an error that a user can mend is printed without its traceback.

    These are kdsr's own, the system's (a full disk, no permission, a file where a folder belongs), a worker
    process that was ended from outside and an interrupt (Ctrl-C).

    Returns:
        The exit code: 0, or the error's; 130 after an interrupt.
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
        problems, exit_code = (
            ["a worker process was ended from outside (out of memory?); use fewer --workers"],
            1,
        )
    except (MemoryError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        if is_out_of_memory(error):
            said = f"out of memory ({said}); smaller batches, patches or networks take less"
        elif said.startswith("DataLoader worker"):
            said = f"{said}; out of memory? Use fewer num_worker_per_gpu"
        else:
            raise
        problems, exit_code = [said], 1
    else:
        return 0
    for problem in problems:
        print(f"{label}: {_printable(problem)}", file=sys.stderr, flush=True)
    return exit_code
