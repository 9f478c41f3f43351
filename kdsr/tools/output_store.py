"""Where ``kdsr data teacher-cache`` writes: a folder of files, or an LMDB."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import lmdb

from kdsr.data.stored_outputs import entries_of
from kdsr.models.cached_teacher import LMDB
from kdsr.runtime.atomic_files import atomic_write, remove_temporaries
from kdsr.runtime.errors import OptionError, TrainingError

SETTINGS = "settings.json"


class Store(Protocol):
    """Where outputs are written, by name without ending."""

    names: set[str]

    def write(self, name: str, content: bytes, ending: str) -> None: ...

    def remove(self, name: str) -> None: ...

    def is_older(self, name: str, file: str) -> bool:
        """Whether an output is older than a file."""


class FolderStore:
    """A file for each output, written atomically."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in filter(Path.is_dir, root.rglob("*")):
            remove_temporaries(folder)  # of a killed command
        self._files = entries_of(str(root))
        self.names = set(self._files)

    def write(self, name: str, content: bytes, ending: str) -> None:
        atomic_write(self.root / f"{name}{ending}", lambda file: file.write(content))

    def remove(self, name: str) -> None:
        (self.root / self._files[name]).unlink()

    def is_older(self, name: str, file: str) -> bool:
        return os.path.exists(file) and os.path.getmtime(self.root / self._files[name]) < os.path.getmtime(
            file
        )


class LmdbStore:
    """An LMDB with one transaction for each output."""

    def __init__(self, path: Path) -> None:
        self.environment = lmdb.open(str(path), map_size=2**28)
        with self.environment.begin() as transaction, transaction.cursor() as cursor:
            self.names = {bytes(key).decode() for key in cursor.iternext(values=False)}

    def write(self, name: str, content: bytes, ending: str) -> None:
        try:
            with self.environment.begin(write=True) as transaction:
                transaction.put(name.encode(), content)
        except lmdb.MapFullError:
            self.environment.set_mapsize(2 * self.environment.info()["map_size"] + len(content))
            self.write(name, content, ending)

    def remove(self, name: str) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.delete(name.encode())

    def is_older(self, name: str, file: str) -> bool:
        return False  # its outputs have no dates


@contextmanager
def store_in(root: Path, settings: dict[str, Any]) -> Iterator[Store]:
    """Opens the outputs in a folder; writes the settings, or compares them with those that are there.

    Raises:
        OptionError: The folder has outputs with other settings.
        TrainingError: It cannot be written.
    """
    file = root / SETTINGS
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        if other := [f"{key} {there.get(key)}" for key, value in settings.items() if there.get(key) != value]:
            raise OptionError(
                f"{root}: its outputs have {', '.join(other)}; give the same options, or remove the folder"
            )
    text = json.dumps(settings, indent=1) + "\n"
    atomic_write(file, lambda out: out.write(text.encode()))
    if not settings["lmdb"]:
        yield FolderStore(root)
        return
    try:
        store = LmdbStore(root / LMDB)
        try:
            yield store
        finally:
            store.environment.close()
    except lmdb.Error as error:
        raise TrainingError(f"{root / LMDB}: cannot be written ({error})") from error
