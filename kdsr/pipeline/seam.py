"""Replaces functions of BasicSR during a call; the only module that does.

BasicSR imports its helpers by name, so the names are replaced in ``basicsr.train``, ``basicsr.test``, the modules of
its data sets and of SRModel, and one method in the base class of its models. The rest of BasicSR is unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import basicsr.data.paired_image_dataset as paired_image_dataset
import basicsr.data.single_image_dataset as single_image_dataset
import basicsr.models.sr_model as sr_model
import basicsr.test
import basicsr.train
from basicsr.models.base_model import BaseModel
from basicsr.utils import bgr2ycbcr

from kdsr.data import pairing
from kdsr.data.image_files import imfrombytes
from kdsr.models.image_metrics import calculate_metric
from kdsr.models.pretrained import load_network
from kdsr.pipeline.session import Session
from kdsr.runtime.atomic_files import archive_and_create
from kdsr.runtime.memory import keep_freed_memory

_Table = dict[str, tuple[Callable[[Session], Any], str]]

# name in basicsr.train -> (replacement, defect of the original)
TRAIN_SEAM: _Table = {
    "parse_options": (
        lambda session: session.parse_options,
        "runs `exec` and `eval` on the command line, ignores unknown keys, seeds before the overrides are applied",
    ),
    "load_resume_state": (
        lambda session: session.load_resume_state,
        "needs a CUDA device, searches below the working directory only, accepts truncated files, and changes the "
        "teacher's path to a file that does not exist",
    ),
    "make_exp_dirs": (
        lambda session: session.make_exp_dirs,
        "creates a folder for every unknown entry of `path`, fails on lists, renames the folder of a running "
        "training",
    ),
    "mkdir_and_rename": (
        lambda session: archive_and_create,
        "renames with a time stamp in seconds: a second rename within a second fails",
    ),
    "copy_opt_file": (
        lambda session: session.copy_opt_file,
        "copies only the top file without pieces and overrides, and fails on a file in the run's folder",
    ),
    "get_env_info": (
        lambda session: session.run_summary,
        "logs a banner of 15 lines, but neither the model nor the run's folder",
    ),
    "dict2str": (
        lambda session: session.all_options,
        "prints all options to the terminal, over a hundred lines; the log file has them",
    ),
    "init_tb_loggers": (
        lambda session: session.init_tb_loggers,
        "on a full disk its writer ends in a separate thread, with a traceback without the file's name",
    ),
    "create_train_val_dataloader": (
        lambda session: session.create_train_val_dataloader,
        "ends a run early (drop_last against ceil), ignores the seed in the order of data, repeats each epoch's crops",
    ),
    "build_model": (
        lambda session: session.build_model,
        "neither validates the teacher before the training nor pads validation images (as in TEST_SEAM); its loop "
        "calls the last validation with an iteration past the end",
    ),
    "CPUPrefetcher": (
        lambda session: session.make_prefetcher,
        "starts the workers twice before the first batch; shows no progress",
    ),
    "CUDAPrefetcher": (
        lambda session: session.make_cuda_prefetcher,
        "starts the workers twice, overwrites batches that the GPU still uses; shows no progress",
    ),
    "MessageLogger": (
        lambda session: session.make_message_logger,
        'counts one remaining iteration too few (an ETA of "-1 day"), breaks the progress line',
    ),
}

TEST_SEAM: _Table = {
    name: TRAIN_SEAM[name] for name in ("parse_options", "make_exp_dirs", "get_env_info", "dict2str")
}
TEST_SEAM["build_dataset"] = (
    lambda session: session.build_dataset,
    "does not name an image that cannot be read",
)
TEST_SEAM["build_model"] = (
    lambda session: session.build_tested_model,
    "does not pad images for networks that need multiples of a window, unless the model is SwinIRModel",
)

_IMFROMBYTES = (imfrombytes, "reduces 16 bits per channel to 8")
# module or class of BasicSR's data sets and models -> name in it -> (replacement, defect of the original)
PARTS_SEAM: dict[Any, dict[str, tuple[Callable[..., Any], str]]] = {
    paired_image_dataset: {
        "imfrombytes": _IMFROMBYTES,
        "paired_paths_from_folder": (
            pairing.paired_paths_from_folder,
            "searches a list for each name: quadratic time, 10 seconds for 40,000 images",
        ),
        "paired_paths_from_meta_info_file": (
            pairing.paired_paths_from_meta_info_file,
            "drops folders on the LQ side: images of the same name in several folders get the same LQ image",
        ),
    },
    single_image_dataset: {
        "imfrombytes": _IMFROMBYTES,
        "rgb2ycbcr": (bgr2ycbcr, "gets BGR images (`color: y`), so red and blue are swapped"),
    },
    sr_model: {
        "calculate_metric": (
            calculate_metric,
            "passes `better` to the metric, which may not take it",
        ),
    },
    BaseModel: {
        "load_network": (
            load_network,
            "reads no .safetensors, no weights of torch.compile or AveragedModel and no NumPy scalars; its errors are "
            "tracebacks or lists of all tensors",
        ),
    },
}

# omitted lines of BasicSR's log -> reason
LEFT_OUT_LINES = {
    "Multiple validation datasets are *only* supported by SRModel.": (
        "wrong: its loop validates any model on all sets; printed at every validation"
    ),
}


@contextmanager
def _lines_left_out() -> Iterator[None]:
    """Removes ``LEFT_OUT_LINES`` from BasicSR's log."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.msg not in LEFT_OUT_LINES

    log = logging.getLogger("basicsr")
    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)


@contextmanager
def _replaced(module: Any, table: _Table, session: Session) -> Iterator[None]:
    tables = {module: {name: make(session) for name, (make, _) in table.items()}}
    for changed, names in PARTS_SEAM.items():
        tables[changed] = {name: replacement for name, (replacement, _) in names.items()}
    with ExitStack() as stack:
        for changed, replacements in tables.items():
            for name, replacement in replacements.items():
                stack.callback(setattr, changed, name, getattr(changed, name))
                setattr(changed, name, replacement)
        yield


def train(root_path: str, argv: list[str] | None = None) -> None:
    """Runs ``basicsr.train.train_pipeline`` with the replacements of ``TRAIN_SEAM``.

    Args:
        root_path: Folder that contains ``experiments/``.
        argv: Command line without the program's name; ``sys.argv`` when None.
    """
    keep_freed_memory()
    session = Session(argv)
    with _replaced(basicsr.train, TRAIN_SEAM, session), _lines_left_out(), session:
        basicsr.train.train_pipeline(root_path)


def test(root_path: str, argv: list[str] | None = None) -> None:
    """Runs ``basicsr.test.test_pipeline`` with the replacements of ``TEST_SEAM``; arguments as for ``train``."""
    session = Session(argv)
    with _replaced(basicsr.test, TEST_SEAM, session), session:
        basicsr.test.test_pipeline(root_path)
