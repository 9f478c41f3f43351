"""Errors that are printed without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import pytest
import skimage.data
import torch
import typer
from torch.utils.data import DataLoader, Dataset

from kdsr.runtime.errors import DataError, OptionError, Stopped, report_errors

REPOSITORY = Path(__file__).resolve().parents[2]


class _Unreadable(Dataset[bytes]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bytes:
        return Path("/nowhere/at/all").read_bytes()


class _Killed(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def _raises(error: BaseException) -> None:
    raise error


def _loses_a_worker() -> None:
    with ProcessPoolExecutor(1) as pool:
        pool.submit(os._exit, 9).result()


def test_success() -> None:
    assert report_errors(lambda: None) == 0


def test_own_errors_have_their_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(lambda: _raises(OptionError(["one", "two"]))) == 2
    assert report_errors(lambda: _raises(DataError("three"))) == 1
    assert capsys.readouterr().err == "".join(f"kdsr: error: {word}\n" for word in ("one", "two", "three"))


def test_a_stop_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(lambda: _raises(Stopped("stopped by SIGTERM"))) == 75
    assert report_errors(lambda: _raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "kdsr: stopped by SIGTERM\nkdsr: interrupted\n"


def test_system_errors_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert report_errors((tmp_path / "file" / "folder").mkdir) == 1
    assert capsys.readouterr().err == f"kdsr: error: {tmp_path}/file/folder: Not a directory\n"
    assert report_errors(lambda: os.replace(tmp_path / "a", tmp_path / "b")) == 1
    expected = f"kdsr: error: {tmp_path}/a -> {tmp_path}/b: No such file or directory\n"
    assert capsys.readouterr().err == expected


def test_system_error_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(lambda: _raises(OSError("no display"))) == 1
    assert report_errors(lambda: _raises(TimeoutError())) == 1
    assert capsys.readouterr().err == "kdsr: error: no display\nkdsr: error: TimeoutError\n"


def test_system_error_of_a_loading_worker(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(lambda: list(DataLoader(_Unreadable(), num_workers=1)) and None) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "/nowhere/at/all" in line and "No such file" in line


def test_a_lost_worker_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(_loses_a_worker) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "worker process" in line


@pytest.mark.parametrize("error", [typer.Exit(3), typer.Abort(), SystemExit(3), KeyError("x")])
def test_other_errors_are_raised(error: BaseException) -> None:
    with pytest.raises(type(error)):
        report_errors(lambda: _raises(error))


def test_a_file_in_the_way_of_a_tool(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    cv2.imwrite(str(tmp_path / "source" / "cat.png"), skimage.data.chelsea()[:40, :40])
    (tmp_path / "out").touch()
    done = subprocess.run(
        [sys.executable, "-m", "kdsr.cli", "data", "sr", "source", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("kdsr: error: out")


def test_killed_loader_process_is_reported_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(lambda: list(DataLoader(_Killed(), num_workers=1))) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("kdsr: error: DataLoader worker (pid") and "num_worker_per_gpu" in line


def test_other_runtime_errors_are_raised() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        report_errors(lambda: _raises(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_out_of_memory_is_one_line(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(lambda: _raises(error)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kdsr: error: out of memory (")


def test_control_characters_of_files_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = OptionError(f"\x1b[31mred\x07 \u202eleft {'x' * 5000}")
    assert report_errors(lambda: _raises(hostile)) == 2
    message = capsys.readouterr().err
    assert "\\x1b[31mred\\x07 \\u202eleft x" in message and "\x1b" not in message
    assert len(message) < 2200
