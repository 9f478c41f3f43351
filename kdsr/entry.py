"""What ``kdsr train``, ``kdsr test`` and the scripts ``kdsr/train.py`` and ``kdsr/test.py`` have in common."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import kdsr
from kdsr.options.early import misspelt
from kdsr.runtime.errors import OptionError, report_errors


def run(is_train: bool, argv: list[str] | None) -> int:
    """Runs a training or a test and returns the exit code: 0, 2 for options that cannot be run, 1 for a failed run.

    Args:
        is_train: Training, or testing.
        argv: The arguments; those of the process by default.
    """

    def checked() -> None:
        # Before BasicSR is imported. A program that has imported it may have registered options of its own.
        if "basicsr" not in sys.modules and (problems := misspelt(argv, is_train)):
            raise OptionError(problems)
        kdsr.register()
        from kdsr.pipeline import seam
        from kdsr.runtime.distributed import explain_lost_ranks

        with explain_lost_ranks():
            (seam.train if is_train else seam.test)(os.getcwd(), argv)

    return report_errors(checked)


def leave(code: int) -> NoReturn:
    """Ends the process, see ``exit_rank``."""
    distributed = sys.modules.get("kdsr.runtime.distributed")  # else there is nothing to end, and no torch
    sys.exit(distributed.exit_rank(code) if distributed else code)
