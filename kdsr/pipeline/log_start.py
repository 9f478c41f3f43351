"""The beginning of a log: a summary on the terminal, all options in the file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import basicsr
import torch
from basicsr.utils import get_env_info, get_root_logger
from basicsr.utils.logger import initialized_logger
from basicsr.utils.options import dict2str

from kdsr.runtime.atomic_files import display_path

_BASICSR = str(Path(basicsr.__file__).parent)
_CREATES = ("build_dataset", "build_loss", "build_model", "build_network")  # "Network [EDSR] is created."


class FileOnly(str):
    """A message for the log file only."""


def _is_for_the_terminal(record: logging.LogRecord) -> bool:
    """False for ``FileOnly`` and for BasicSR's lines on created objects and on a network's layers."""
    if isinstance(record.msg, FileOnly):
        return False
    if record.levelno > logging.INFO or not record.pathname.startswith(_BASICSR):
        return True
    layers = record.funcName == "print_network" and not str(record.msg).startswith("Network: ")
    return not (layers or record.funcName in _CREATES)


def run_summary(opt: dict[str, Any]) -> str:
    """Returns the summary of a run (model, device, folder, log file), and filters the terminal's log from now on.

    Args:
        opt: The parsed options; the log must be open.
    """
    files = []
    for handler in logging.getLogger("basicsr").handlers:
        if isinstance(handler, logging.FileHandler):
            files.append(handler.baseFilename)
        else:
            handler.addFilter(_is_for_the_terminal)
    device = torch.cuda.get_device_name() if opt["num_gpu"] else "the CPU"
    if opt["world_size"] > 1:
        device = f"{opt['world_size']} processes, each on {device}"
    steps = f", {int(opt['train']['total_iter']):,d} iterations" if opt["is_train"] else ""
    lines = [
        f"{'Training' if opt['is_train'] else 'Testing'} {opt['name']}",
        f"Model: {opt['model_type']}{steps}, on {device}",
        f"Folder: {display_path(opt['path']['log'])}",
        *(f"Log, with all options: {os.path.basename(file)}" for file in files),
    ]
    return "\n\t".join(lines)


def all_options(opt: dict[str, Any]) -> FileOnly:
    """Returns BasicSR's banner, versions and options for the log file; also logs the warnings there."""
    for warning in opt.get("warnings", ()):
        get_root_logger().warning(FileOnly(warning))
    shown = {key: value for key, value in opt.items() if key != "warnings"}
    return FileOnly(f"{get_env_info()}\n{dict2str(shown)}")


def reset_logger() -> None:
    """Resets BasicSR's logger, which would keep the log file of the first run."""
    logger = logging.getLogger("basicsr")
    logger.setLevel(logging.NOTSET)
    if initialized_logger.pop("basicsr", None):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()


@contextmanager
def errors_only() -> Iterator[None]:
    """Logs only errors, for checks before the run."""
    reset_logger()
    logging.getLogger("basicsr").setLevel(logging.ERROR)
    try:
        yield
    finally:
        reset_logger()


class HeldLog(logging.Handler):
    """A context that stores log lines until the log file is open."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def __enter__(self) -> HeldLog:
        reset_logger()
        logger = logging.getLogger("basicsr")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        initialized_logger["basicsr"] = True  # so that BasicSR does not add handlers
        return self

    def __exit__(self, *_: object) -> None:
        reset_logger()

    def release_lines(self) -> None:
        """Writes the stored lines to the log."""
        logger = get_root_logger()
        for record in self.records:
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
        self.records.clear()
