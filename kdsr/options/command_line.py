"""The command line of ``kdsr train`` and ``kdsr test``: BasicSR's flags, and overrides without a flag."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence


def make_parser(is_train: bool = True) -> argparse.ArgumentParser:
    """Returns a parser of BasicSR's flags; ``--force_yml`` may be repeated."""
    parser = argparse.ArgumentParser(
        description=f"{'Trains' if is_train else 'Tests'} what an option file describes."
    )
    if parser.prog == "kdsr":
        parser.prog = f"kdsr {'train' if is_train else 'test'}"
    parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="as --force_yml, for example train.total_iter=5; or the option file"
        + ("" if is_train else ", or the folder of a run"),
    )
    parser.add_argument(
        "-opt",
        "--opt",
        type=str,
        metavar="FILE",
        help="option file (YAML)"
        + ("" if is_train else ", of a test or of a training, or the folder of a run"),
    )
    parser.add_argument(
        "--launcher", choices=["none", "pytorch", "slurm"], default="none", help="job launcher"
    )
    parser.add_argument(
        "--auto_resume", action="store_true", help="resume from the newest state of this run, if any"
    )
    parser.add_argument(
        "--force_resume",
        action="store_true",
        help="resume even if the networks or the training images have changed",
    )
    if not is_train:
        parser.add_argument(
            "--random_weights",
            action="store_true",
            help="test a network without pretrained weights",
        )
    parser.add_argument(
        "--debug", action="store_true", help="validate and save every 8 iterations, as debug_NAME"
    )
    parser.add_argument("--local_rank", type=int, default=None, help="set by older launchers")
    parser.add_argument(
        "--force_yml",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY:KEY=VALUE",
        help="override options of the file, for example train:ema_decay=0.999",
    )
    return parser


def read_arguments(is_train: bool = True, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line; needs no torch.

    Args:
        is_train: Training, or testing.
        argv: The arguments; those of the process by default.

    Returns:
        BasicSR's arguments. ``force_yml`` holds all overrides; those without a flag come last.

    Raises:
        SystemExit: With exit code 2, if a flag is unknown or the option file is missing.
    """
    parser = make_parser(is_train)
    args = parser.parse_intermixed_args(
        [_with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    )
    files = [word for word in args.words if "=" not in word or os.path.exists(word)]
    args.force_yml = [*args.force_yml, *(word for word in args.words if word not in files)]
    if args.opt is None and files:
        args.opt = files.pop(0)
    if args.opt is None:
        parser.error("the option file is missing: -opt FILE")
    if files:
        parser.error(f"neither a flag nor KEY=VALUE: {' '.join(files)}")
    return args


def parse_arguments(is_train: bool = True, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Like :func:`read_arguments`, with ``local_rank`` as a number.

    Raises:
        OptionError: LOCAL_RANK in the environment is not a number.
    """
    from kdsr.runtime.launchers import whole_number  # imports torch

    args = read_arguments(is_train, argv)
    if args.local_rank is None:
        args.local_rank = whole_number("LOCAL_RANK", 0)
    elif args.launcher == "pytorch":
        os.environ["LOCAL_RANK"] = str(args.local_rank)
    return args


def _with_underscores(word: str) -> str:
    """Converts ``--auto-resume`` to ``--auto_resume``; the text after ``=`` is unchanged."""
    return re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)
