"""The functions that replace those of BasicSR's pipeline during a run, and their shared state."""

from __future__ import annotations

import argparse
import functools
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from basicsr.data import build_dataloader
from basicsr.train import init_tb_loggers
from basicsr.utils import check_resume, get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch.utils.data import DataLoader

from kdsr.models.cached_teacher import is_outputs, outputs_are_given
from kdsr.models.restorer import pad_in_tests
from kdsr.models.state_validation import loading_state
from kdsr.models.trainer import LoopInterface
from kdsr.options.dump import dump
from kdsr.options.parse import parse_options, warn
from kdsr.options.signatures import registered
from kdsr.pipeline.between_steps import LoopPrefetcher, TrainingLoop
from kdsr.pipeline.event_log import EventLog, thread_excepthook
from kdsr.pipeline.log_start import FileOnly, HeldLog, all_options, errors_only, reset_logger, run_summary
from kdsr.pipeline.preflight import build, rehearse
from kdsr.pipeline.progress import Batches, CudaBatches, Progress, ProgressMessageLogger
from kdsr.pipeline.rehearsal import ValidationRehearsal
from kdsr.pipeline.resume import changes, newest_state, read_state, run_record
from kdsr.pipeline.run_data import (
    make_dataset,
    require_a_batch,
    require_room_for_cache,
    require_unique_names,
    whole_training_images,
)
from kdsr.pipeline.run_folder import refuse_foreign_folder, refuse_own_files
from kdsr.pipeline.training_data import TrainingData, end_workers
from kdsr.runtime.atomic_files import archive_and_create
from kdsr.runtime.distributed import leave_distributed, on_first_rank
from kdsr.runtime.errors import OptionError, Stopped
from kdsr.runtime.memory import gib
from kdsr.runtime.run_lock import RunLock, time_to_wait
from kdsr.runtime.snapshot import left_unchanged
from kdsr.runtime.stopping import STOP_SIGNALS, StopRequest

MEASURED_OUTPUTS = 20  # training images on which stored outputs are measured
_FOLDERS = ("models", "training_states", "log", "visualization")


class Session:
    """State shared by the replaced functions during one run.

    Args:
        argv: Command line without the program's name; ``sys.argv`` when None.
    """

    def __init__(self, argv: list[str] | None) -> None:
        self.argv = argv
        self.datasets: dict[str, Any] = {}
        self.args: argparse.Namespace
        self.opt: dict[str, Any] = {}
        self.resume_state: dict[str, Any] | None = None
        self.record: dict[str, Any] = {}
        self.model: Any = None
        self.log = HeldLog()  # lines that the model logs before the log is open
        self.notes: list[str] = []  # lines for the log, which is not open yet
        self.val_loaders: list[Any] = []
        self.progress = Progress()
        self.stop = StopRequest()
        self.tb_logger: Any = None
        self.batches: Batches | CudaBatches | None = None
        self.locks: list[RunLock] = []

    def __enter__(self) -> Session:
        reset_logger()
        # On a full disk, logging would print a traceback for each line. The lines still go to the terminal, and the
        # next save stops the run.
        self.raises, logging.raiseExceptions = logging.raiseExceptions, False
        self.hook, threading.excepthook = threading.excepthook, thread_excepthook
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        logging.raiseExceptions = self.raises
        threading.excepthook = self.hook
        # Called in reverse order, each even if another one fails.
        with ExitStack() as last:
            last.callback(leave_distributed, wait=error is None or issubclass(error, Stopped))
            for lock in self.locks:
                last.callback(lock.release)
            if self.tb_logger:
                last.callback(self.tb_logger.close)  # a stopped run has events in its queue
            last.callback(self.progress.close)
            last.callback(self.stop.__exit__)
            if self.batches is not None:
                last.callback(end_workers, self.batches.iterator)

    # ------------------------------------------------------------------------------ before anything is written

    def parse_options(self, root_path: str, is_train: bool) -> tuple[dict[str, Any], argparse.Namespace]:
        """Parses the options, builds data sets and model, and checks them before a folder is created."""
        opt, self.args = parse_options(root_path, is_train, self.argv)
        self.opt = opt
        on_first_rank(
            lambda: refuse_foreign_folder(opt)
        )  # it may rename the folder while other ranks check it
        if is_train:
            self.stop = StopRequest(opt.get("stop_signals", STOP_SIGNALS)).__enter__()
        for name, dataset_opt in opt["datasets"].items():
            self.datasets[name] = make_dataset(name, dataset_opt, opt["manual_seed"])
        if is_train:
            require_a_batch(opt, len(self.datasets["train"]))
            require_room_for_cache(opt["datasets"]["train"], self.datasets["train"])
        self.ours = issubclass(registered(MODEL_REGISTRY)[opt["model_type"]], LoopInterface)
        require_unique_names(opt, self.datasets, self.ours)
        if opt["dist"] and not self.ours and opt["num_gpu"] == 0:
            raise OptionError(
                f"--launcher: BasicSR's own {opt['model_type']} needs a GPU under a launcher; use KDModel"
            )
        with self.log:
            self.model = build(opt)
        self.cudnn_benchmark = torch.backends.cudnn.benchmark
        with errors_only():
            validation = ValidationRehearsal(opt, self.datasets)
            with left_unchanged(self.model):
                validation.try_model(self.model)
            if is_train:
                # a separate data set, so that the loader's workers do not share its open files
                rehearse(self.model, opt, make_dataset("train", opt["datasets"]["train"], opt["manual_seed"]))
        warn(opt, validation.conclude())
        return opt, self.args

    # ------------------------------------------------------------------------------ names of basicsr.train

    def load_resume_state(self, opt: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the newest valid state (``--auto_resume``), else that of ``path.resume_state``.

        Rank 0 finds it and compares it with the options; the other ranks read the same file.
        """
        self._lock(opt)
        path, seed, self.record, self.notes = on_first_rank(lambda: self._find_state(opt))
        if seed != opt["manual_seed"]:
            opt["manual_seed"] = self.args.resolved["manual_seed"] = seed
            for dataset in self.datasets.values():
                dataset.seed = seed
        if path is None:
            refuse_own_files(opt)
            return None
        self.resume_state = state = self.resume_state or read_state(path)
        opt["path"]["resume_state"] = str(path)
        if self.ours:
            with errors_only(), left_unchanged(self.model):
                self.model.trainer.checkpointer.load(state, str(path))
        else:
            # BasicSR's models load their weights through the options, kdsr's from the state.
            check_resume(opt, state["iter"])
            self.model = None
        return state

    def _find_state(self, opt: dict[str, Any]) -> tuple[Path | None, int, dict[str, Any], list[str]]:
        folders, state = opt["path"], None
        notes: list[str] = []
        named = Path(folders["resume_state"]) if folders.get("resume_state") else None
        path = None
        if opt["auto_resume"]:
            state, path, notes = newest_state(Path(folders["training_states"]), Path(folders["models"]))
        if path is None and named is not None:  # the first start of a run that resumes automatically later
            state, path = read_state(named), named
        elif named is not None and path is not None:
            notes.append(f"path.resume_state: {named} is not used, --auto_resume resumes from {path}")
        seed = opt["manual_seed"]
        if state is not None and self.args.seed_is_drawn and state.get("manual_seed") is not None:
            seed = state["manual_seed"]
        record = run_record({**self.args.resolved, "manual_seed": seed}, self.datasets["train"])
        if state is not None and path is not None and self.ours:
            with loading_state(str(path)):
                notes += changes(state, record, path, self.args.force_resume)
        self.resume_state = state
        return path, seed, record, notes

    def run_summary(self) -> str:
        """Replaces BasicSR's banner, which is only in the log file (``all_options``)."""
        return run_summary(self.opt)

    def all_options(self, opt: dict[str, Any]) -> FileOnly:
        """Returns all options, for the log file."""
        return all_options(opt)

    def _lock(self, opt: dict[str, Any]) -> None:
        """Locks the folders of the run on rank 0, before anything in them is read, renamed or written."""
        folders = [opt["path"]["experiments_root" if opt["is_train"] else "results_root"]]
        if opt["is_train"] and opt["logger"].get("use_tb_logger") and "debug" not in opt["name"]:
            folders.append(Path(opt["root_path"], "tb_logger", opt["name"]))
        self.locks = [RunLock(folder) for folder in folders]
        wait = time_to_wait(opt["auto_resume"], (opt.get("dist_params") or {}).get("timeout"))
        warn(opt, on_first_rank(lambda: [lock.take(wait) for lock in self.locks]))

    def make_exp_dirs(self, opt: dict[str, Any]) -> None:
        """Creates the run's folders. BasicSR would also create one for any unknown entry of ``path``."""
        if not opt["is_train"]:
            self._lock(opt)
        if opt["rank"] == 0:
            archive_and_create(opt["path"]["experiments_root" if opt["is_train"] else "results_root"])
            for key in _FOLDERS:
                if key in opt["path"]:
                    Path(opt["path"][key]).mkdir(parents=True, exist_ok=True)

    def copy_opt_file(self, opt_file: str, experiments_root: str) -> None:
        """Writes the resolved options to the run's folder."""
        file = Path(experiments_root) / Path(opt_file).name
        on_first_rank(lambda: dump(self.args.resolved, file))

    def init_tb_loggers(self, opt: dict[str, Any]) -> EventLog | None:
        """Returns TensorBoard's writer on rank 0, if it is enabled."""
        log = EventLog(lambda: init_tb_loggers(opt), str(Path(opt["root_path"], "tb_logger", opt["name"])))
        return log if log.writer is not None else None

    def create_train_val_dataloader(
        self, opt: dict[str, Any], logger: Any
    ) -> tuple[Any, Any, list[Any], int, int]:
        """Returns loaders whose epochs add up to exactly ``total_iter`` steps."""
        for note in self.notes:
            logger.warning(note)
        train_set = self.datasets["train"]
        if opt["datasets"]["train"].get("cache") == "ram":
            cache = train_set.fill_cache()
            logger.info(f"cache: ram: {len(cache)} decoded images in {gib(cache.nbytes)} of shared memory")
        self.data = data = TrainingData(opt, train_set, self.resume_state)
        for name, dataset_opt in opt["datasets"].items():
            if name.split("_")[0] == "val":
                dataset = self.datasets[name]
                self.val_loaders.append(build_dataloader(dataset, dataset_opt, opt["num_gpu"], opt["dist"]))
                logger.info(f"Number of val images/folders in {dataset_opt['name']}: {len(dataset)}")

        total_iters = int(opt["train"]["total_iter"])
        ratio = opt["datasets"]["train"].get("dataset_enlarge_ratio", 1)
        logger.info(
            f"Training statistics:\n\tNumber of train images: {len(train_set)}\n\tDataset enlarge ratio: {ratio}"
            f"{data.describe()}; iters: {total_iters}."
        )
        # The loop includes the last epoch. Its own count mixes ceil with drop_last and stops early.
        return data.loader, data.sampler, self.val_loaders, data.last_epoch, total_iters

    def build_model(self, opt: dict[str, Any]) -> Any:
        """Returns the model; validates the teacher once before the training."""
        model = self.build_tested_model(opt)
        if self.ours:
            model.trainer.checkpointer.run_record = self.record
        if not self.ours and hasattr(model, "validation"):  # kdsr's models do this themselves
            made = self.resume_state["iter"] if self.resume_state else 0
            model.validation = up_to_iteration(max(int(opt["train"]["total_iter"]), made), model.validation)
        if self.resume_state is None and hasattr(model, "validate_teacher"):
            self._measure_teacher(opt, model)
        return model

    def _measure_teacher(self, opt: dict[str, Any], model: Any) -> None:
        """Validates the teacher, with ``val.teacher``; its stored outputs on some of the training images.

        Outputs of another program are always measured.
        """
        val = opt.get("val") or {}
        if not outputs_are_given(opt):
            if val.get("teacher"):
                model.validate_teacher(self.val_loaders)
            return
        if not (val.get("teacher") or is_outputs(opt["network_t"])):
            return
        if not val.get("metrics"):
            get_root_logger().warning("network_t: its outputs are not measured, there are no val.metrics")
            return
        images = whole_training_images(opt, with_outputs=True)
        images.keep(MEASURED_OUTPUTS)
        model.validate_teacher([DataLoader(images)])

    def make_prefetcher(self, loader: Any) -> LoopPrefetcher:
        return self._looped(Batches(loader))

    def make_cuda_prefetcher(self, loader: Any, opt: dict[str, Any]) -> LoopPrefetcher:
        if opt["num_gpu"] == 0:
            get_root_logger().warning("datasets.train.prefetch_mode: cuda has no effect on the CPU")
            return self.make_prefetcher(loader)
        return self._looped(CudaBatches(loader))

    def _looped(self, prefetcher: Batches | CudaBatches) -> LoopPrefetcher:
        self.batches = prefetcher
        self.loop.start(self.val_loaders, self.tb_logger)
        return LoopPrefetcher(prefetcher, self.loop, self.progress.advance)

    def make_message_logger(
        self, opt: dict[str, Any], start_iter: int, tb_logger: Any
    ) -> ProgressMessageLogger:
        """Also creates the ``TrainingLoop``: the loop calls this first after it has loaded the state."""
        self.tb_logger = tb_logger
        self.loop = TrainingLoop(
            opt, self.model, self.data, self.stop, start_iter if self.resume_state else None
        )
        return ProgressMessageLogger(opt, start_iter, tb_logger, self.progress)

    # ------------------------------------------------------------------------------ names of basicsr.test

    def build_tested_model(self, opt: dict[str, Any]) -> Any:
        """Logs the notes and returns the model that was built with the options.

        BasicSR's models are changed to take images of any size. A resumed one is built anew, because the options now
        have the files of its weights.
        """
        log = get_root_logger()
        for note in self.args.notes:
            log.info(note)
        if self.model is None:
            self.model = build(opt)
        self.log.release_lines()
        # options that were set since
        self.model.opt.update({key: opt[key] for key in ("root_path", "manual_seed", "path") if key in opt})
        if self.ours:
            torch.backends.cudnn.benchmark = self.cudnn_benchmark  # BasicSR has enabled it
        else:
            pad_in_tests(self.model, opt)
        return self.model

    def build_dataset(self, dataset_opt: dict[str, Any]) -> Any:
        """Returns the data set that was built and checked with the options."""
        return next(made for made in self.datasets.values() if made.opt["name"] == dataset_opt["name"])


def up_to_iteration(last: int, validation: Callable[..., None]) -> Callable[..., None]:
    """Limits the iteration in a model's ``validation``: BasicSR's last one has an iteration past the end."""

    @functools.wraps(validation)
    def real(dataloader: Any, current_iter: int, *args: Any, **kwargs: Any) -> None:
        validation(dataloader, min(current_iter, last), *args, **kwargs)

    return real
