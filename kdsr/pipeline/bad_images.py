"""Tells of the training images that ``on_bad_image: skip`` has replaced."""

from __future__ import annotations

import sys
from typing import Any

from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import get_dist_info

from kdsr.data.seeded_dataset import REPLACED


class ReplacedImages:
    """Counts the replaced items of this process, and names each unreadable image once.

    Loader processes cannot count for the run, so that the items say themselves what they stand for. The counts are
    those of the life of a process: a resumed run begins at 0 and names the images again.

    Attributes:
        count: Items that another image was loaded for.
        paths: The unreadable images that were met.
    """

    def __init__(self) -> None:
        self.count = 0
        self.paths: set[str] = set()
        self._of_epoch = 0

    def take_from(self, batch: dict[str, Any] | None) -> None:
        """Takes the note out of a batch as it arrives, and logs what is new in it."""
        for note in (batch or {}).pop(REPLACED, ()):
            paths = note.split("\n") if note else []
            self.count += bool(paths)
            for path in paths:
                if path not in self.paths:
                    self.paths.add(path)
                    _say(f"Skipped unreadable image {path} ({len(self.paths)} so far)")

    def begin_epoch(self) -> None:
        """Sums up the epoch before, where anything was replaced in it."""
        new = self.count - self._of_epoch
        self._of_epoch = self.count
        if new:
            _say(
                f"{new} items of the last epoch stand for unreadable images "
                f"({self.count} items and {len(self.paths)} images since the start of this process)"
            )


def _say(text: str) -> None:
    rank, _ = get_dist_info()
    if rank == 0:
        get_root_logger().warning(text)
    else:  # only the first rank has a log; what the others met must be seen too
        print(f"Warning: rank {rank}: {text}", file=sys.stderr, flush=True)
