"""TensorBoard's events, and errors in writing them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from kdsr.pipeline.event_log import EventLog, thread_excepthook
from kdsr.runtime.errors import TrainingError


def test_values_arrive(tmp_path: Path) -> None:
    log = EventLog(lambda: SummaryWriter(str(tmp_path / "run")), "tb_logger/run")
    log.add_scalar("losses/l_pix", 0.5, 1)
    log.close()
    (events,) = (tmp_path / "run").iterdir()
    assert b"losses/l_pix" in events.read_bytes()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(
        TrainingError, match=r"^tb_logger/run: TensorBoard's events cannot be written \(File exists\)"
    ):
        EventLog(lambda: SummaryWriter(str(tmp_path / "run")), "tb_logger/run")


def test_a_failure_is_reported_once(tmp_path: Path) -> None:
    log = EventLog(lambda: SummaryWriter(str(tmp_path / "run")), "tb_logger/run")
    log.writer.close()
    (events,) = (tmp_path / "run").iterdir()
    events.unlink()
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("in the way of what is written next")
    with pytest.raises(TrainingError, match="tb_logger/run"):
        log.add_scalar("a", 1.0, 1)
    log.close()  # says nothing more


def test_other_threads_keep_their_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    class _AsyncWriterThread(threading.Thread):  # TensorBoard's name
        def run(self) -> None:
            raise OSError(28, "No space left on device")

    class Mine(threading.Thread):
        def run(self) -> None:
            raise OSError(28, "No space left on device")

    hook, threading.excepthook = threading.excepthook, thread_excepthook
    try:
        for kind in (_AsyncWriterThread, Mine):
            thread = kind(name=kind.__name__)
            thread.start()
            thread.join()
    finally:
        threading.excepthook = hook
    message = capsys.readouterr().err
    assert "Exception in thread Mine" in message and "_AsyncWriterThread" not in message
