"""A lock on the folder of a run, against a second run in it.

The locked file is next to the folder, because a new run renames an existing folder.

The lock is a POSIX lock (``fcntl.lockf``): the kernel releases it when the process ends, NFS forwards it to the server
(version 4, and version 3 with ``lockd``), and forked loader processes that outlive the run do not inherit it, unlike
``flock`` and open-file-description locks. Any ``close`` of the file within the process releases it, so no other code
may open it.
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
_TRIES = 100  # to open a file that other runs may remove meanwhile
# Seconds that a job waits for the previous run: longer than Slurm's KillWait (30) and than an NFS 4 server keeps the
# locks of a machine that does not respond (90).
PATIENCE = 180
_SCHEDULERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
# Lock file -> its content, for locks of this process: POSIX locks do not conflict within a process. A forked process
# has the entry, but not the lock.
_held: dict[Path, dict[str, Any]] = {}


class RunLock:
    """A lock on the folder of a run, held from ``take`` until ``release`` or the end of the process."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.file = lock_file(self.folder)
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._pid = os.getpid()

    def take(self, wait: float = 0) -> str | None:
        """Locks the folder.

        Args:
            wait: Seconds to wait for another run to end before this one is refused.

        Returns:
            None, or a warning if the folder cannot be locked; the run then continues without a lock.

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
                    "a second run in this folder would not be detected"
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
        """Releases the lock and removes its file; does nothing if this process does not hold it."""
        if self._pid != os.getpid():
            return
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if _is_at(descriptor, self.file):
                    self.file.unlink()
            _held.pop(self.file, None)
            os.close(descriptor)
        for folder in self._made:  # removed only if empty
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _try(self) -> dict[str, Any] | None:
        """Takes the lock, or returns its holder.

        Raises:
            OSError: The file cannot be created, or the file system has no locks.
        """
        here = _held.get(self.file)
        if here is not None and here["pid"] == os.getpid():
            return here
        failure = OSError(errno.EAGAIN, "it is removed repeatedly", str(self.file))
        for _ in range(_TRIES):
            try:
                self._make_folder()
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except (FileNotFoundError, FileExistsError) as error:
                failure = error  # another run has removed its empty folder
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
        # An NFS 3 server keeps the locks of a failed machine until that machine returns.
        return f"{advice}; if that machine is gone for good, delete {self.file}"


def time_to_wait(auto_resume: bool, timeout: float | None = None) -> float:
    """Seconds that a run waits for another one in its folder before it is refused.

    A job that Slurm has requeued, or the next job of a chain with ``--auto_resume``, may start while the previous run
    is still ending. Any other run is refused at once.

    Args:
        auto_resume: Whether the run resumes from the newest state.
        timeout: Seconds that other ranks wait for this one (``dist_params.timeout``), if set.
    """
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    in_a_job = any(name in os.environ for name in _SCHEDULERS)
    if not (requeued or (auto_resume and in_a_job)):
        return 0
    return PATIENCE if timeout is None else min(PATIENCE, timeout / 2)


def lock_file(folder: Path) -> Path:
    """The lock file of a run's folder: a hidden file next to it."""
    name = f".{folder.name}.lock"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(folder.name)).hexdigest()}.lock"
    return folder.with_name(name)


def _lock(descriptor: int) -> dict[str, Any] | None:
    """Locks an open file and returns None, or returns the holder's entry in it, {} if unknown."""
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
    """Whether an open file still has this name: a run removes its file at its end."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE: removed by another NFS client
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
    with contextlib.suppress(OSError):  # disk full: the lock is valid without the entry
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        os.fsync(descriptor)  # makes it visible to other NFS clients


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "its host and process id are unknown"
    job = f", Slurm job {holder['job']}" if "job" in holder else ""
    return f"host {holder.get('host')}, process {holder.get('pid')}, started {holder.get('start')}{job}"
