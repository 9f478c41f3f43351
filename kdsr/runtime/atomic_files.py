"""Atomic writes: a file is complete or absent, even when the process is killed while writing."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from kdsr.runtime.errors import TrainingError

# Errors of file systems that cannot flush a folder (some network and FUSE mounts).
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file atomically: writes a temporary file in the same folder, flushes it to disk and renames it.

    Args:
        path: The file; its folder is created.
        write: Called with the open temporary file.

    Raises:
        TrainingError: It cannot be written (disk full, no permission); the earlier file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        raise TrainingError(
            f"{path}: cannot be written ({_reason(error)}); the earlier file is untouched"
        ) from error


def _reason(error: BaseException) -> str:
    """The first system error in the chain: torch's zip writer raises a second error after a failed write."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


def _sync_folder(folder: Path) -> None:
    # The new name must reach the disk too. Windows cannot open folders, and os.replace is enough there.
    if os.name == "posix":
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except PermissionError:  # the folder is writable but not readable
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
        finally:
            os.close(descriptor)


def remove_temporaries(folder: str | Path) -> None:
    """Removes temporary files that killed writers left in a folder. No writer may be active in it."""
    for file in Path(folder).glob(".*.tmp"):
        file.unlink(missing_ok=True)


def display_path(path: str | Path) -> str:
    """A path for messages: relative to the working directory if it lies below it."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


def archive_and_create(folder: str | Path) -> None:
    """Creates a folder; an existing one is renamed to ``NAME_archived_DATE``, with ``_2``, ... if that exists too."""
    folder = Path(folder)
    if os.path.lexists(folder):
        name = f"{folder}_archived_{datetime.now():%Y%m%d_%H%M%S}"
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        archive = next(name for name in names if not os.path.lexists(name))
        print(f"{display_path(folder)} exists and is renamed to {display_path(archive)}", flush=True)
        folder.rename(archive)
    folder.mkdir(parents=True, exist_ok=True)
