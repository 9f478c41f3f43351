"""Reads LMDBs, each opened once per process."""

from __future__ import annotations

import os
from collections.abc import Sequence

import lmdb

from kdsr.runtime.errors import DataError

_open: dict[str, tuple[int, lmdb.Environment]] = {}  # by path, with the process that opened it


def _environment(path: str) -> lmdb.Environment:
    process, environment = _open.get(path, (None, None))
    if environment is not None:
        if process == os.getpid():
            return environment
        environment.close()  # a forked worker opens its own; its parent's stays open
        del _open[path]
    try:
        environment = lmdb.open(path, create=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"Cannot open the LMDB {path}: {error}") from error
    _open[path] = (os.getpid(), environment)
    return environment


class LmdbClient:
    """Stands in for BasicSR's ``FileClient`` with the ``lmdb`` backend.

    lmdb refuses to open an LMDB twice in a process, which BasicSR does where two sets, or GT and LQ of one set, lie
    in the same one. Clients of this class share what is open. They can be pickled.

    Args:
        db_paths: LMDBs.
        client_keys: Their names, in the same order.
    """

    def __init__(self, db_paths: Sequence[str], client_keys: Sequence[str]) -> None:
        self._paths = {key: os.path.realpath(path) for key, path in zip(client_keys, db_paths, strict=True)}

    def get(self, filepath: str, client_key: str) -> bytes | None:
        """Reads the value of a key; None where there is none.

        Raises:
            DataError: The LMDB cannot be opened.
        """
        with _environment(self._paths[client_key]).begin() as transaction:
            return transaction.get(str(filepath).encode())
