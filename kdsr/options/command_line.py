"""The command line of ``kdsr train`` and ``kdsr test``: BasicSR's flags, and overrides that need none."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence


def make_parser(is_train: bool = True) -> argparse.ArgumentParser:
    """BasicSR's flags; ``--force_yml`` more than once. Words without a flag are for :func:`read_arguments`."""
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
        "--auto_resume", action="store_true", help="go on from the newest state of this run, if any"
    )
    parser.add_argument(
        "--force_resume",
        action="store_true",
        help="go on from a state although the networks or the training images have changed since",
    )
    if not is_train:
        parser.add_argument(
            "--random_weights",
            action="store_true",
            help="test a network for which no weights are named, with random ones",
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
        help="options that replace the file's, for example train:ema_decay=0.999",
    )
    return parser


def read_arguments(is_train: bool = True, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line; needs no torch.

    Args:
        is_train: Training, or testing.
        argv: The arguments; those of the process by default.

    Returns:
        BasicSR's arguments. ``force_yml`` holds all overrides, those without a flag last.

    Raises:
        SystemExit: With exit code 2, when a flag is not known or no option file is named.
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
    """As :func:`read_arguments`, and ``local_rank`` is a number.

    Raises:
        OptionError: LOCAL_RANK in the environment is no number.
    """
    from kdsr.runtime.launchers import whole_number  # imports torch

    args = read_arguments(is_train, argv)
    if args.local_rank is None:
        args.local_rank = whole_number("LOCAL_RANK", 0)
    elif args.launcher == "pytorch":
        os.environ["LOCAL_RANK"] = str(args.local_rank)
    return args


def _with_underscores(word: str) -> str:
    """``--auto-resume`` is ``--auto_resume``; what follows an ``=`` stays."""
    return re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)
