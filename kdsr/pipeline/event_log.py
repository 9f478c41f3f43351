"""A TensorBoard writer whose errors name the folder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kdsr.runtime.errors import TrainingError


class EventLog:
    """Wraps a ``SummaryWriter``, whose errors come from a thread and lack the file's name.

    Args:
        make: Creates the writer.
        folder: Its folder, for messages.

    Raises:
        TrainingError: Here and in each method, if the events cannot be written (disk full).
    """

    def __init__(self, make: Callable[[], Any], folder: str) -> None:
        self.folder = folder
        self.failed = False
        with self._explain_errors():
            self.writer = make()

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = True
            raise TrainingError(
                f"{self.folder}: TensorBoard's events cannot be written ({error.strerror or error}); "
                "set logger.use_tb_logger: false to train without them"
            ) from error

    def add_scalar(self, tag: str, value: Any, iteration: int) -> None:
        """Adds a value to the curve ``tag``."""
        with self._explain_errors():
            self.writer.add_scalar(tag, value, iteration)

    def close(self) -> None:
        """Flushes the events; does nothing after an error."""
        if not self.failed:
            with self._explain_errors():
                self.writer.close()


def thread_excepthook(args: threading.ExceptHookArgs) -> None:
    """``threading.excepthook`` without the errors of TensorBoard's writer, which :class:`EventLog` reports."""
    writer = type(args.thread).__name__ == "_AsyncWriterThread"
    if not (writer and issubclass(args.exc_type, OSError)):
        threading.__excepthook__(args)
