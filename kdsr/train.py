"""Trains what an option file describes: ``python kdsr/train.py -opt FILE [BasicSR's flags]``."""

from __future__ import annotations

import os
import sys

if not __package__:
    # Run as a script: Python has put kdsr/ itself first on the path, where kdsr.models would also be "models".
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from kdsr import entry


def main(argv: list[str] | None = None) -> int:
    """Runs the training and returns the exit code: 0, 2 for options that cannot be run, 1 for a run that failed."""
    return entry.run(True, argv)


if __name__ == "__main__":
    entry.leave(main())
