"""Atomic writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kdsr.runtime.atomic_files import _sync_folder, archive_and_create, atomic_write


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that flushes no folders")
def test_a_file_system_that_cannot_flush_folders_is_accepted() -> None:
    folder = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(folder)
    os.close(folder)
    _sync_folder(Path("/proc"))


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"whole")

    class Killed(BaseException):
        pass

    def write(stream: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise Killed

    with pytest.raises(Killed):
        atomic_write(file, write)
    assert file.read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folders_archived_within_one_second_have_unique_names(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    for number in range(6):
        archive_and_create(run)
        if number % 2:  # else it stays empty: a rename would replace an empty folder without a word
            (run / str(number)).touch()
    archives = [path for path in run.parent.iterdir() if path != run]
    assert len(archives) == 5 and all(path.name.startswith("run_archived_2") for path in archives)
    assert sorted(file.name for path in archives for file in path.iterdir()) == ["1", "3"]
    assert [file.name for file in run.iterdir()] == ["5"]
