"""A file from a web server: resumed where it broke off, checked, and there as a whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
import zipfile
import zlib
from pathlib import Path

import requests
from tqdm import tqdm

from kdsr.runtime.errors import KdsrError

PART = ".part"  # ending of an unfinished file; the same download continues it
TIMEOUT = 30.0  # seconds without an answer or a byte
_CHUNK = 1 << 14  # bytes; what of it has come is lost when the connection breaks off
_RESERVE = 16 << 20  # bytes of the disk that stay free
_ATTEMPTS = 5  # connections that may break off one after the other without a byte
_PAUSE = 1.0  # seconds before another attempt


class DownloadError(KdsrError):
    """Something cannot be fetched; at most an unfinished ``.part`` file is left."""

    exit_code = 2


def megabytes(size: int) -> str:
    """A size in MB, as servers state it: 10^6 bytes."""
    return f"{size / 1e6:,.1f} MB"


def download(url: str, file: Path, *, size: int | None = None, sha256: str = "", md5: str = "") -> None:
    """Downloads a file, or continues ``file.part`` by a ``Range`` request.

    Args:
        url: Address, http or https.
        file: Where it goes; its folder is created.
        size: Its size in bytes, if known.
        sha256: Its SHA-256, or the beginning of it; empty: not known.
        md5: Its MD5; empty: not known.

    Raises:
        DownloadError: The server refuses, breaks off without sending anything, or has another file; the disk is full
            or the folder is not writable. A file that is not the right one is removed.
    """
    part = file.with_name(file.name + PART)
    new_folders = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _receive(url, part, size)
        check_file(part, url, sha256, md5)
        os.replace(part, file)
    except requests.RequestException as error:
        raise DownloadError(f"{url}: {_reason(error)}{_kept(part)}") from error
    except OSError as error:
        raise DownloadError(f"{file}: {error.strerror or error}{_kept(part)}") from error
    finally:
        if part.exists() and not _length(part):
            part.unlink()
        for folder in new_folders:
            with contextlib.suppress(OSError):  # it is not empty: something has come
                folder.rmdir()


def _receive(url: str, part: Path, size: int | None) -> None:
    """Fills ``part``, over as many connections as are needed."""
    failures, dropped = 0, False
    while True:
        before = _length(part)
        try:
            total = _one_connection(url, part, size)
            problem = f"broke off at {megabytes(_length(part))}"
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            if not part.exists():  # nothing has come yet: no server
                raise
            total, problem = None, _reason(error)
        if total is not None and _length(part) == total:
            return
        dropped |= _length(part) < before  # starting again and again would not end
        failures = 0 if _length(part) > before and not dropped else failures + 1
        if failures == _ATTEMPTS:
            raise DownloadError(f"{url}: {problem}{_kept(part)}")
        time.sleep(_PAUSE if failures else 0)


def _one_connection(url: str, part: Path, size: int | None) -> int:
    """Appends what one connection gives. Returns the size of the whole file, as far as it is known."""
    have = _length(part)
    # without compression, or the lengths would be others
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416 and have:  # nothing beyond what is there
            there = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
            if have == (size or (there and int(there.group(1)))):
                return have
            part.unlink()  # the beginning of another file
            return -1
        if answer.status_code not in (200, 206):
            raise DownloadError(f"{url}: {answer.status_code} {answer.reason}{_kept(part)}")
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise DownloadError(f"{url}: is a web page and no file; get it by hand")
        total = _total(answer, have)
        if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        ):
            raise DownloadError(f"{url}: the server continues at another place than {have}; remove {part}")
        if size is not None and total not in (None, size):
            part.unlink(missing_ok=True)
            raise DownloadError(
                f"{url}: the server has {total:,} bytes, and {size:,} were expected; nothing is kept"
            )
        total = size if total is None else total
        if answer.status_code == 200:  # the server cannot continue
            have = 0
        _check_space(part, (total or 0) - have)
        _append(answer, part, have, total)
        return _length(part) if total is None else total


def _total(answer: requests.Response, have: int) -> int | None:
    """The size of the whole file that a server states; None: it states none."""
    if answer.status_code == 206:
        found = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
        return int(found.group(1)) if found else None
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _append(answer: requests.Response, part: Path, have: int, total: int | None) -> None:
    with (
        part.open("ab" if have else "wb") as file,
        tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=part.name[: -len(PART)], disable=None
        ) as bar,
    ):
        for chunk in answer.iter_content(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and _length(part) > total:
        part.unlink()
        raise DownloadError(f"{answer.url}: the server sent more than {total:,} bytes; nothing is kept")


def check_file(file: Path, source: str, sha256: str = "", md5: str = "") -> None:
    """Compares the checksum; without one at least the checksums inside a zip, as ``.pth`` files are.

    Raises:
        DownloadError: It is another file, or damaged, and is removed.
    """
    problem = ""
    if sha256 or md5:
        kind, expected = ("sha256", sha256) if sha256 else ("md5", md5)
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, kind).hexdigest()
        if not found.startswith(expected):
            problem = f"is another file: {kind} {found}, and {expected} was expected"
    elif zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
            damaged = str(error)
        problem = f"is damaged ({damaged})" if damaged else ""
    if problem:
        file.unlink()
        raise DownloadError(f"{source}: {problem}; nothing is kept")


def _check_space(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed + _RESERVE > free:
        raise DownloadError(
            f"{part.parent}: no space: {megabytes(needed)} are needed, {megabytes(free)} are free{_kept(part)}"
        )


def _length(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _kept(part: Path) -> str:
    return f"; {part} is kept, the same command continues it" if _length(part) else ""


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT:.0f} s"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(error, requests.ConnectionError):
        return "cannot be reached"
    return str(error).splitlines()[0]
