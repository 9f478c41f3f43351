"""Logs the training images that ``on_bad_image: skip`` has replaced."""

from __future__ import annotations

import sys
from typing import Any

from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import get_dist_info

from kdsr.data.seeded_dataset import REPLACED


class ReplacedImages:
    """Counts replaced items and logs each unreadable image once, per process: a resumed run starts at 0.

    Loader processes cannot share a count, so each item carries a note of the images that it replaces.

    Attributes:
        count: Items that were replaced.
        paths: The unreadable images.
    """

    def __init__(self) -> None:
        self.count = 0
        self.paths: set[str] = set()
        self._of_epoch = 0

    def collect(self, batch: dict[str, Any] | None) -> None:
        """Removes the notes from a batch and logs new images."""
        for note in (batch or {}).pop(REPLACED, ()):
            paths = note.split("\n") if note else []
            self.count += bool(paths)
            for path in paths:
                if path not in self.paths:
                    self.paths.add(path)
                    _warn(f"Skipped unreadable image {path} ({len(self.paths)} so far)")

    def begin_epoch(self) -> None:
        """Logs the number of items replaced in the last epoch, if any."""
        new = self.count - self._of_epoch
        self._of_epoch = self.count
        if new:
            _warn(
                f"{new} items of the last epoch replaced unreadable images "
                f"({self.count} items and {len(self.paths)} images since the start of this process)"
            )


def _warn(text: str) -> None:
    rank, _ = get_dist_info()
    if rank == 0:
        get_root_logger().warning(text)
    else:  # only rank 0 has a log
        print(f"Warning: rank {rank}: {text}", file=sys.stderr, flush=True)
