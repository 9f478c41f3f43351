"""The one place where names inside BasicSR are replaced, for the time of a call.

BasicSR's modules import their helpers by name, so what is replaced are the names in ``basicsr.train``,
``basicsr.test`` and the modules of its data sets and of SRModel, and a method of the base class of its models.
Everything else of BasicSR runs as it is.
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

_Table = dict[str, tuple[Callable[[Session], Any], str]]

# name in basicsr.train -> (what stands in for it, the defect that this cures)
TRAIN_SEAM: _Table = {
    "parse_options": (
        lambda session: session.parse_options,
        "runs `exec` and `eval` on the command line, ignores unknown keys, seeds before the overrides apply",
    ),
    "load_resume_state": (
        lambda session: session.load_resume_state,
        "needs a CUDA device, looks beside the working directory only, takes truncated files, and rewrites the "
        "teacher's path to a file that never existed",
    ),
    "make_exp_dirs": (
        lambda session: session.make_exp_dirs,
        "makes a folder of every entry of `path` that it does not know, fails on lists; moves a folder aside in which "
        "another run is at work",
    ),
    "mkdir_and_rename": (
        lambda session: archive_and_create,
        "names what it moves aside by the second: the next one in that second cannot be moved",
    ),
    "copy_opt_file": (
        lambda session: session.copy_opt_file,
        "copies one of several composed files, without the overrides, and fails on a run's own file",
    ),
    "get_env_info": (
        lambda session: session.run_summary,
        "begins with 15 lines of banner, and says neither what runs nor where it writes",
    ),
    "dict2str": (
        lambda session: session.all_options,
        "fills the terminal with all options, a hundred lines and more, before what matters; the file has them",
    ),
    "init_tb_loggers": (
        lambda session: session.init_tb_loggers,
        "a full disk ends its writer in a thread of its own, with a traceback that names no file",
    ),
    "create_train_val_dataloader": (
        lambda session: session.create_train_val_dataloader,
        "ends a run early (drop_last against ceil), orders data without regard to the seed, repeats each epoch's crops",
    ),
    "build_model": (
        lambda session: session.build_model,
        "does not look at the teacher before it teaches, nor pad validation images (as in TEST_SEAM); its loop "
        "makes the last validation with an iteration past the end",
    ),
    "CPUPrefetcher": (
        lambda session: session.make_prefetcher,
        "starts the workers twice before the first batch; shows no progress",
    ),
    "CUDAPrefetcher": (
        lambda session: session.make_cuda_prefetcher,
        "starts the workers twice, writes batches over those that the GPU still computes with; shows no progress",
    ),
    "MessageLogger": (
        lambda session: session.make_message_logger,
        'counts one iteration too few to go (an ETA of "-1 day"), writes through a progress line',
    ),
}

TEST_SEAM: _Table = {
    name: TRAIN_SEAM[name] for name in ("parse_options", "make_exp_dirs", "get_env_info", "dict2str")
}
TEST_SEAM["build_dataset"] = (
    lambda session: session.build_dataset,
    "does not say which image cannot be read",
)
TEST_SEAM["build_model"] = (
    lambda session: session.build_tested_model,
    "does not pad images for networks that need multiples of a window, unless the model is SwinIRModel",
)

_IMFROMBYTES = (imfrombytes, "reduces 16 bits per channel to 8")
# module or class of BasicSR's data sets and models -> name in it -> (what stands in for it, the defect that this cures)
PARTS_SEAM: dict[Any, dict[str, tuple[Callable[..., Any], str]]] = {
    paired_image_dataset: {
        "imfrombytes": _IMFROMBYTES,
        "paired_paths_from_folder": (
            pairing.paired_paths_from_folder,
            "looks each name up in a list: 10 seconds for 40,000 images, and four times as much for twice as many",
        ),
        "paired_paths_from_meta_info_file": (
            pairing.paired_paths_from_meta_info_file,
            "drops the folders of the listed names on the LQ side: images of equal names get one partner",
        ),
    },
    single_image_dataset: {
        "imfrombytes": _IMFROMBYTES,
        "rgb2ycbcr": (bgr2ycbcr, "is given BGR images (`color: y`): red and blue are swapped"),
    },
    sr_model: {
        "calculate_metric": (
            calculate_metric,
            "passes `better` on to the metric, which may have no such argument",
        ),
    },
    BaseModel: {
        "load_network": (
            load_network,
            "reads no .safetensors, no weights of torch.compile or AveragedModel and no numpy numbers, and ends in a "
            "traceback or a list of all names of tensors",
        ),
    },
}

# lines of BasicSR's log that are left out -> why
LEFT_OUT_LINES = {
    "Multiple validation datasets are *only* supported by SRModel.": (
        "its loop validates any model on each of the sets; printed at every validation"
    ),
}


@contextmanager
def _lines_left_out() -> Iterator[None]:
    """Keeps ``LEFT_OUT_LINES`` out of BasicSR's log."""

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
    """Runs ``basicsr.train.train_pipeline`` with the defects of ``TRAIN_SEAM`` cured.

    Args:
        root_path: Folder under which ``experiments/`` lies.
        argv: Command line without the program's name; ``sys.argv`` when None.
    """
    session = Session(argv)
    with _replaced(basicsr.train, TRAIN_SEAM, session), _lines_left_out(), session:
        basicsr.train.train_pipeline(root_path)


def test(root_path: str, argv: list[str] | None = None) -> None:
    """Runs ``basicsr.test.test_pipeline`` with the defects of ``TEST_SEAM`` cured; arguments as for ``train``."""
    session = Session(argv)
    with _replaced(basicsr.test, TEST_SEAM, session), session:
        basicsr.test.test_pipeline(root_path)
