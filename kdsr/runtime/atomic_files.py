"""Files that are whole or absent, also when the process is killed while it writes."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from kdsr.runtime.errors import TrainingError

# what file systems say that cannot flush a folder (some of those mounted over a network or by a user)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


def write_whole(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file of which only the whole new version or the one before is ever seen.

    A temporary file in the same folder is written, flushed to the disk and renamed.

    Args:
        path: The file; its folder is made.
        write: Gets the open temporary file.

    Raises:
        TrainingError: It cannot be written (disk full, no permission); what was there before is untouched.
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
    """The system's own words where there are any: torch's zip writer stumbles over a failed write once more."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


def _sync_folder(folder: Path) -> None:
    # The new name itself must reach the disk too; Windows opens no folders, replace is enough there.
    if os.name == "posix":
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except PermissionError:  # a folder that may be written and not be read
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
        finally:
            os.close(descriptor)


def sweep_temporaries(folder: str | Path) -> None:
    """Removes what killed writers of ``write_whole`` left in a folder. No writer may be at work in it."""
    for left in Path(folder).glob(".*.tmp"):
        left.unlink(missing_ok=True)


def from_here(path: str | Path) -> str:
    """A path for messages: relative to the working directory where it lies below it."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


def begin_anew(folder: str | Path) -> None:
    """Makes a folder; one that is there already is renamed to ``NAME_archived_DATE``, with ``_2``, ... if need be."""
    folder = Path(folder)
    if os.path.lexists(folder):
        name = f"{folder}_archived_{datetime.now():%Y%m%d_%H%M%S}"
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        archive = next(name for name in names if not os.path.lexists(name))
        print(f"{from_here(folder)} exists and is renamed to {from_here(archive)}", flush=True)
        folder.rename(archive)
    folder.mkdir(parents=True, exist_ok=True)
