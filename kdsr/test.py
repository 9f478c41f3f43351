"""Tests what an option file describes, or what a run has trained.

``python kdsr/test.py -opt FILE [BasicSR's flags]``, ``python kdsr/test.py experiments/NAME``
"""

from __future__ import annotations

import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # see train.py


def main(argv: list[str] | None = None) -> int:
    """Runs the test and returns the exit code: 0, 2 for options that cannot be run, 1 for a run that failed."""
    import kdsr  # noqa: F401  first: makes BasicSR importable
    from kdsr.pipeline import seam
    from kdsr.runtime.distributed import explain_lost_ranks
    from kdsr.runtime.errors import report_errors

    def run() -> None:
        with explain_lost_ranks():
            seam.test(os.getcwd(), argv)

    return report_errors(run)


if __name__ == "__main__":
    code = main()
    from kdsr.runtime.distributed import exit_rank

    sys.exit(exit_rank(code))
