"""TensorBoard's events: a writer that says which file it cannot write."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kdsr.runtime.errors import TrainingError


class EventLog:
    """What a training asks of a ``SummaryWriter``; its errors come from a thread of its own, without a file's name.

    Args:
        make: Makes the writer.
        folder: Where it writes, for messages.

    Raises:
        TrainingError: Here, and from each method, when the events cannot be written (a full disk).
    """

    def __init__(self, make: Callable[[], Any], folder: str) -> None:
        self.folder = folder
        self.failed = False
        with self._told():
            self.writer = make()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = True
            raise TrainingError(
                f"{self.folder}: TensorBoard's events cannot be written ({error.strerror or error}); "
                "logger.use_tb_logger: false does without them"
            ) from error

    def add_scalar(self, tag: str, value: Any, iteration: int) -> None:
        """Adds a value to the curve ``tag``."""
        with self._told():
            self.writer.add_scalar(tag, value, iteration)

    def close(self) -> None:
        """Writes what is left; does nothing after a failure, which has been told."""
        if not self.failed:
            with self._told():
                self.writer.close()


def tell_no_writer(args: threading.ExceptHookArgs) -> None:
    """``threading.excepthook`` that leaves it to :class:`EventLog` to tell what stopped the writer's thread."""
    writer = type(args.thread).__name__ == "_AsyncWriterThread"
    if not (writer and issubclass(args.exc_type, OSError)):
        threading.__excepthook__(args)
