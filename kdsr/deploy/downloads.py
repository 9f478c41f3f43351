"""The table of published weights and data sets (``downloads.yml``): entries by name, or by path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdsr.deploy.http_download import megabytes
from kdsr.options.files import load, parse_yaml
from kdsr.runtime.errors import OptionError
from kdsr.runtime.suggestions import nearest

_FILE = Path(__file__).with_suffix(".yml")
_KEYS = ("pretrain_network_", "dataroot_")  # options that name files and folders


@dataclass(frozen=True)
class Download:
    """An entry of the table; see the head of ``downloads.yml``."""

    name: str
    what: str
    to: str
    licence: str
    tried: bool
    url: str = ""
    wheel: str = ""
    page: str = ""
    size: int | None = None
    about: str = ""
    sha256: str = ""
    md5: str = ""
    also: list[str] = field(default_factory=list)
    unpack: list[list[str]] = field(default_factory=list)
    convert: dict[str, Any] = field(default_factory=dict)
    then: list[dict[str, Any]] = field(default_factory=list)

    @property
    def source(self) -> str:
        """What is downloaded; empty: a person has to."""
        return self.url or self.wheel

    @property
    def shown_size(self) -> str:
        """The size in words."""
        return megabytes(self.size) if self.size else self.about or "?"

    @property
    def is_there(self) -> bool:
        """Whether the file, or a folder that is not empty, is there."""
        place = Path(self.to)
        return place.is_file() or (place.is_dir() and any(place.iterdir()))

    @property
    def by_hand(self) -> str:
        """What a person has to do."""
        begins = f" (its SHA-256 begins with {self.sha256})" if self.sha256 else ""
        return f"{self.name}: cannot be downloaded by a program; get {self.what} at {self.page}, as {self.to}{begins}"


def read_table(file: Path = _FILE) -> dict[str, Download]:
    """All entries by name."""
    entries = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    return {name: Download(name=name, **entry) for name, entry in entries.items()}


def find(names: Sequence[str], table: Mapping[str, Download]) -> list[Download]:
    """The entries of these names, each once.

    Raises:
        OptionError: A name is not in the table.
    """
    known = {name: entry.name for entry in table.values() for name in (entry.name, *entry.also)}
    if unknown := [name for name in names if name not in known]:
        raise OptionError([f"NAME: nothing is called {name}; {nearest(name, known)}" for name in unknown])
    return [table[name] for name in dict.fromkeys(known[name] for name in names)]


@dataclass
class Lacking:
    """What an option file names and is not there.

    Attributes:
        downloads: Entries of the table.
        commands: What makes a path, and the entry that it makes it of.
        unknown: Option and path, of what is not in the table.
    """

    downloads: list[Download] = field(default_factory=list)
    commands: dict[str, Download] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def lacking(file: Path, table: Mapping[str, Download]) -> Lacking:
    """Finds what an option file lacks.

    Raises:
        OptionError: It cannot be read.
    """
    found = Lacking()
    for key, path in _paths(load(file)):
        if Path(path).expanduser().exists():
            continue
        entry, command = _match(os.path.normpath(path), table)
        if entry is None:
            found.unknown.append(f"{key}: {path}")
        elif not entry.is_there and entry not in found.downloads:
            found.downloads.append(entry)
        if entry and command:
            found.commands[command] = entry
    return found


def _paths(options: Any, place: str = "") -> Iterator[tuple[str, str]]:
    pairs = options.items() if isinstance(options, dict) else ()
    for key, value in pairs:
        here = f"{place}.{key}" if place else key
        if key.startswith(_KEYS):
            yield from ((here, path) for path in (value if isinstance(value, list) else [value]) if path)
        else:
            yield from _paths(value, here)


def _match(path: str, table: Mapping[str, Download]) -> tuple[Download | None, str]:
    for entry in table.values():
        if path == entry.to or path.startswith(f"{entry.to}/"):
            return entry, ""
        for step in entry.then:
            if path in step["makes"]:
                return entry, step["run"]
    return None, ""
