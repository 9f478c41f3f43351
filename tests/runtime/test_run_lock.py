"""The lock on a run's folder, between real processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.runtime.errors import OptionError
from kdsr.runtime.run_lock import PATIENCE, RunLock, lock_file, time_to_wait


def in_child(do: Callable[[], object]) -> Any:
    """The return value of ``do`` in a forked process that ends without cleanup, or its OptionError's message."""
    result, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = do()
        except OptionError as error:
            found = str(error)
        os.write(tell, json.dumps(found).encode())
        os._exit(0)
    os.close(tell)
    with os.fdopen(result, "rb") as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)


@contextlib.contextmanager
def holder(folder: Path, seconds: float = 3600) -> Iterator[int]:
    """A process that holds the lock until it is killed, or for some seconds."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        lock = RunLock(folder)
        lock.take()
        os.write(tell, b".")
        time.sleep(seconds)
        lock.release()
        os._exit(0)
    os.close(tell)
    assert os.read(ready, 1) == b"."
    os.close(ready)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


names = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=255).filter(
    lambda name: name not in (".", "..") and len(os.fsencode(name)) <= 255
)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(name=names, tail=st.sampled_from(["", "x", "x" * 250, ".lock"]))
def test_a_run_of_any_name_is_locked_for_other_processes(
    name: str, tail: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = (name + tail) if len(os.fsencode(name + tail)) <= 255 else name
    folder = tmp_path_factory.mktemp("runs", numbered=True) / name
    lock = RunLock(folder)
    assert lock.take() is None
    refusal = in_child(lambda: RunLock(folder).take())
    assert f"name: {folder} is in use by another run" in refusal and f"process {os.getpid()}" in refusal
    assert len(refusal.splitlines()) == len(str(folder).splitlines())  # one line, as far as the name is one
    assert in_child(lambda: RunLock(folder.with_name(f"{name[:20]} of another name")).take()) is None
    folder.mkdir()
    folder.rename(folder.with_name("archive"))  # what a run that begins anew does with the older one
    assert "is in use" in in_child(lambda: RunLock(folder).take())
    lock.release()
    assert not lock.file.exists()
    assert in_child(lambda: RunLock(folder).take()) is None


@settings(deadline=None, derandomize=True, max_examples=100)
@given(one=names, other=names)
def test_two_names_have_two_locks(one: str, other: str) -> None:
    files = [lock_file(Path("experiments", name)) for name in (one, other)]
    assert (files[0] == files[1]) == (one == other)
    for file in files:
        assert file.name.startswith(".") and len(os.fsencode(file.name)) <= 255


def test_a_killed_process_releases_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as pid:
        with pytest.raises(OptionError, match=f"process {pid}, started 2"):
            RunLock(tmp_path / "run").take()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        lock = RunLock(tmp_path / "run")
        assert lock.file.exists()
        assert lock.take() is None
    assert f"process {os.getpid()}," in in_child(lambda: RunLock(tmp_path / "run").take())
    lock.release()


def test_a_forked_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    """It does not release its parent's lock, either."""
    lock = RunLock(tmp_path / "run")
    lock.take()
    survivor = os.fork()
    if survivor == 0:
        time.sleep(3600)
    try:
        in_child(lock.release)
        assert "is in use" in in_child(lambda: RunLock(tmp_path / "run").take())
        lock.release()
        assert in_child(lambda: RunLock(tmp_path / "run").take()) is None
    finally:
        os.kill(survivor, signal.SIGKILL)
        os.waitpid(survivor, 0)


def test_within_one_process_too(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    for _ in range(2):
        assert first.take() is None
        with pytest.raises(OptionError, match=f"process {os.getpid()}"):
            second.take()
        second.release()  # of what it does not hold
        assert "is in use" in in_child(lambda: RunLock(tmp_path / "run").take())
        first.release()
    assert second.take() is None
    second.release()


def test_it_waits_for_a_run_that_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path / "run", seconds=2):
        lock = RunLock(tmp_path / "run")
        assert lock.take(wait=60) is None
        lock.release()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"kdsr: {tmp_path}/run is in use") and line.endswith(
        "waiting up to 60 s for its end"
    )


def test_the_wait_ends(tmp_path: Path) -> None:
    with holder(tmp_path / "run"), pytest.raises(OptionError, match="is in use"):
        RunLock(tmp_path / "run").take(wait=1.5)


def test_never_two_at_once_while_files_come_and_go(tmp_path: Path) -> None:
    """Each release removes the file and folders of the lock, while others use them."""
    folder, inside = tmp_path / "made" / "too" / "run", tmp_path / "inside"

    def work() -> int:
        done = 0
        while done < 100:
            lock = RunLock(folder)
            try:
                warning = lock.take()
            except OptionError:
                continue
            assert warning is None, warning
            inside.mkdir()  # fails where another one is inside
            inside.rmdir()
            lock.release()
            done += 1
        return done

    results, tell = os.pipe()
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if work() == 100 else 1
            finally:
                os._exit(code)
        children.append(child)
    os.close(results)
    os.close(tell)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_a_lock_leaves_no_folder_behind(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for folder in ("old/new/run", "new/newer/run"):
        with holder(tmp_path / folder, seconds=0.2) as pid:
            lock = RunLock(tmp_path / folder)
            with pytest.raises(OptionError, match="is in use"):
                lock.take()
            os.waitpid(pid, 0)
            lock.release()
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


def test_a_removed_file_is_locked_again(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    first.take()
    first.file.unlink()
    assert in_child(lambda: RunLock(tmp_path / "run").take()) is None
    with holder(tmp_path / "run"):
        first.release()
        assert second.file.exists()  # it is not first's
        with pytest.raises(OptionError, match="is in use"):
            second.take()


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lock = RunLock(tmp_path / "file" / "run")
    warning = lock.take()
    assert warning is not None and f"cannot be locked (File exists: {tmp_path}/file)" in warning
    lock.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of file systems that are not available here."""

    def lockf(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock = RunLock(tmp_path / "run")
    warning = lock.take()
    assert warning is not None and os.strerror(number) in warning and "would not be detected" in warning
    lock.release()


def test_the_advice_for_a_holder_on_another_host(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as pid:
        file = RunLock(tmp_path / "run").file
        file.write_text(json.dumps({"host": "n7", "pid": pid, "start": "2030-01-01 00:00:00", "job": "77"}))
        with pytest.raises(OptionError, match=f"host n7, .*, Slurm job 77.*delete {file}"):
            RunLock(tmp_path / "run").take()
        file.write_text("{")  # in the middle of its writing
        with pytest.raises(OptionError, match="its host and process id are unknown"):
            RunLock(tmp_path / "run").take()


@pytest.mark.parametrize(
    ("variables", "auto_resume", "timeout", "seconds"),
    [
        ({}, True, None, 0),
        ({"SLURM_JOB_ID": "7"}, False, None, 0),
        ({"SLURM_JOB_ID": "7"}, True, None, PATIENCE),
        ({"PBS_JOBID": "7"}, True, 10_000, PATIENCE),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False, None, PATIENCE),
        ({"SLURM_RESTART_COUNT": "0"}, False, None, 0),
        ({"SLURM_RESTART_COUNT": "2"}, True, 60, 30),
    ],
)
def test_who_waits(
    variables: dict[str, str],
    auto_resume: bool,
    timeout: float | None,
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "PBS_JOBID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert time_to_wait(auto_resume, timeout) == seconds
