"""Reads LMDBs, opening each once per process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import lmdb

from kdsr.runtime.errors import DataError

_opening = threading.Lock()  # lmdb refuses to open an LMDB twice in a process
_open: dict[str, tuple[int, lmdb.Environment]] = {}  # by path, with the id of the process that opened it


def _environment(path: str) -> lmdb.Environment:
    with _opening:
        return _opened(path)


def _opened(path: str) -> lmdb.Environment:
    process, environment = _open.get(path, (None, None))
    if environment is not None:
        if process == os.getpid():
            return environment
        environment.close()  # after a fork; the parent's stays open
        del _open[path]
    try:
        environment = lmdb.open(path, create=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"Cannot open the LMDB {path}: {error}") from error
    pages, page = environment.info()["last_pgno"] + 1, environment.stat()["psize"]
    size = os.path.getsize(os.path.join(path, "data.mdb"))
    if size < pages * page:  # reading past the end would crash with SIGBUS
        environment.close()
        raise DataError(
            f"The LMDB {path} is truncated: data.mdb has {size} bytes of {pages * page}; copy or create it again"
        )
    _open[path] = (os.getpid(), environment)
    return environment


@contextmanager
def _cursor(path: str) -> Iterator[lmdb.Cursor]:
    path = os.path.realpath(path)
    was_open = path in _open and _open[path][0] == os.getpid()
    try:
        with (
            # buffers: reads only the needed pages
            _environment(path).begin(buffers=True) as transaction,
            transaction.cursor() as cursor,
        ):
            yield cursor
    except lmdb.Error as error:
        raise DataError(f"Cannot read the LMDB {path}: {error}") from error
    finally:
        if not was_open and path in _open:  # the file may be replaced before it is used
            _open.pop(path)[1].close()


def first_bytes(path: str, keys: Iterable[str], count: int) -> dict[str, bytes | None]:
    """The first ``count`` bytes of each key's value; None for a missing key.

    Raises:
        DataError: The LMDB cannot be opened or is damaged.
    """
    with _cursor(path) as cursor:
        return {key: bytes(cursor.value()[:count]) if cursor.set_key(key.encode()) else None for key in keys}


def stored_keys(path: str) -> list[str]:
    """All keys; errors as of ``first_bytes``."""
    with _cursor(path) as cursor:
        return [bytes(key).decode() for key in cursor.iternext(values=False)]


class LmdbClient:
    """Replaces BasicSR's ``FileClient`` with the ``lmdb`` backend; can be pickled.

    lmdb refuses to open an LMDB twice in a process, as BasicSR does if two data sets, or GT and LQ, use the same one.
    Clients of this class share open LMDBs. ``client_keys`` are the names of ``db_paths``, in the same order.
    """

    def __init__(self, db_paths: Sequence[str], client_keys: Sequence[str]) -> None:
        self._paths = {key: os.path.realpath(path) for key, path in zip(client_keys, db_paths, strict=True)}

    def get(self, filepath: str, client_key: str) -> bytes | None:
        """The value of a key, or None; a ``DataError`` if the LMDB cannot be opened or is damaged at this key."""
        path = self._paths[client_key]
        try:
            with _environment(path).begin() as transaction:
                return transaction.get(str(filepath).encode())
        except lmdb.Error as error:
            raise DataError(f"Cannot read the key {str(filepath)!r} of the LMDB {path}: {error}") from error
