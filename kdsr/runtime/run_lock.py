"""Keeps two runs out of one folder.

A run locks a file beside its folder, not in it: the folder itself is renamed when a run begins anew.

The lock is a POSIX lock (``fcntl.lockf``). The kernel releases it when the process dies, in whatever way. NFS passes
it on to the server (version 4, and version 3 with ``lockd``), and a loader process that survives its run does not
hold it, as it would hold an ``flock`` or an open-file-description lock that it inherits by fork. Its weakness is that
any ``close`` of the file within the process releases it, so nothing else here may open it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from kdsr.runtime.errors import OptionError

_LONGEST_NAME = 255  # bytes, on nearly all file systems
_TRIES = 100  # of opening a file that others remove in the meantime
# Seconds for which a job waits for the run before it: longer than Slurm's KillWait (30) and than a server of NFS 4
# keeps the locks of a machine that it does not hear any more (90).
PATIENCE = 180
_SCHEDULERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
# Lock file -> what this process has written into it: within a process, POSIX locks do not conflict. A process that was
# forked since then has the entry without the lock.
_held: dict[Path, dict[str, Any]] = {}


class RunLock:
    """A lock on the folder of a run, from ``take`` until ``release`` or the end of the process.

    Args:
        folder: The run's folder, which need not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.file = lock_file(self.folder)
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._pid = os.getpid()

    def take(self, wait: float = 0) -> str | None:
        """Locks the folder.

        Args:
            wait: For how many seconds to wait for another run to end before this one is refused.

        Returns:
            None, or a warning when the folder cannot be locked here; the run then goes on without a lock.

        Raises:
            OptionError: Another run holds the lock.
        """
        deadline = time.monotonic() + wait
        announced = False
        while True:
            try:
                holder = self._try()
            except OSError as error:
                return (
                    f"{self.folder} cannot be locked ({error.strerror}: {error.filename or self.file}); "
                    "a second run in this folder would not be noticed"
                )
            if holder is None:
                return None
            used = f"{self.folder} is in use by another run ({_described(holder)})"
            if time.monotonic() >= deadline:
                raise OptionError(f"name: {used}; {self._advice(holder)}")
            if not announced:
                print(f"kdsr: {used}; waiting up to {wait:.0f} s for its end", file=sys.stderr, flush=True)
                announced = True
            time.sleep(min(1, max(0, deadline - time.monotonic())))

    def release(self) -> None:
        """Releases the lock and removes its file; without effect when this process does not hold it."""
        if self._pid != os.getpid():
            return
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if _is_at(descriptor, self.file):
                    self.file.unlink()
            _held.pop(self.file, None)
            os.close(descriptor)
        for folder in self._made:  # stays unless it is empty: nothing was written
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _try(self) -> dict[str, Any] | None:
        """Takes the lock, or returns its holder.

        Raises:
            OSError: The file cannot be made, or this file system has no locks.
        """
        here = _held.get(self.file)
        if here is not None and here["pid"] == os.getpid():
            return here
        failure = OSError(errno.EAGAIN, "it is removed each time", str(self.file))
        for _ in range(_TRIES):
            try:
                self._make_folder()
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except (FileNotFoundError, FileExistsError) as error:
                failure = error  # another run may just have removed a folder that it had made
                continue
            try:
                holder = _lock(descriptor)
                if holder is None and _is_at(descriptor, self.file):
                    self._descriptor = descriptor
                    _held[self.file] = _this_process()
                    _write(descriptor, _held[self.file])
                    return None
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
            if holder is not None:
                return holder
        raise failure

    def _make_folder(self) -> None:
        missing = [folder for folder in self.file.parents if not folder.exists()]
        os.makedirs(self.file.parent, exist_ok=True)
        self._made += [folder for folder in missing if folder not in self._made]

    def _advice(self, holder: dict[str, Any]) -> str:
        advice = "wait for its end or give this run another name"
        if holder.get("host") == socket.gethostname():
            return advice
        # A server of NFS 3 keeps the locks of a machine that has died until that machine comes back.
        return f"{advice}; if that machine is gone for good, delete {self.file}"


def time_to_wait(auto_resume: bool, timeout: float | None = None) -> float:
    """For how many seconds a run waits for another one in its folder before it is refused.

    A job that Slurm has queued again may start while its earlier life still ends, and so may the next job of a chain,
    which goes on with ``--auto_resume``. Anything else is refused at once.

    Args:
        auto_resume: Whether the run goes on from the newest state.
        timeout: Seconds for which other ranks wait for this one (``dist_params.timeout``), if it is set.
    """
    queued_again = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    in_a_job = any(name in os.environ for name in _SCHEDULERS)
    if not (queued_again or (auto_resume and in_a_job)):
        return 0
    return PATIENCE if timeout is None else min(PATIENCE, timeout / 2)


def lock_file(folder: Path) -> Path:
    """The file whose lock stands for a run's folder: hidden, beside it."""
    name = f".{folder.name}.lock"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(folder.name)).hexdigest()}.lock"
    return folder.with_name(name)


def _lock(descriptor: int) -> dict[str, Any] | None:
    """Locks an open file; otherwise what its holder has written into it, {} where that is not known."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(os.pread(descriptor, 4096, 0))
            if isinstance(found, dict):
                return found
        return {}
    return None


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file is still the one of that name: a run that ends removes its own."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE: removed by another client of NFS
            return False
        raise


def _this_process() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": datetime.now().astimezone().isoformat(" ", "seconds"),
        **({"job": job} if job else {}),
    }


def _write(descriptor: int, holder: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        os.fsync(descriptor)  # other clients of NFS see it only then


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "it has not left its host and process id"
    job = f", Slurm job {holder['job']}" if "job" in holder else ""
    return f"host {holder.get('host')}, process {holder.get('pid')}, started {holder.get('start')}{job}"
