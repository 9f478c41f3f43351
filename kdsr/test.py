"""Tests what an option file describes, or what a run has trained.

``python kdsr/test.py -opt FILE [BasicSR's flags]``, ``python kdsr/test.py experiments/NAME``
"""

from __future__ import annotations

import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # see train.py

from kdsr import entry


def main(argv: list[str] | None = None) -> int:
    """Runs the test and returns the exit code: 0, 2 for options that cannot be run, 1 for a run that failed."""
    return entry.run(False, argv)


if __name__ == "__main__":
    entry.leave(main())
