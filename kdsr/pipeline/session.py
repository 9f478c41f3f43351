"""What surrounds one call of BasicSR's loop: the functions that the seam puts in its place, and what they share."""

from __future__ import annotations

import argparse
import logging
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from basicsr.data import build_dataloader
from basicsr.data.prefetch_dataloader import CUDAPrefetcher
from basicsr.models import build_model
from basicsr.utils import check_resume, get_root_logger, make_exp_dirs
from basicsr.utils.dist_util import get_dist_info
from basicsr.utils.logger import initialized_logger
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from kdsr.data.samplers import PositionSampler
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.models.base_model import RestorationModel
from kdsr.pipeline import options
from kdsr.pipeline.option_names import registered
from kdsr.pipeline.preflight import check_checkpoints, refuse_own_files, rehearse
from kdsr.pipeline.progress import Batches, Progress, ProgressMessageLogger, TickingPrefetcher
from kdsr.runtime.distributed import leave_distributed
from kdsr.runtime.errors import CheckpointError, OptionError

_FOLDERS = ("experiments_root", "results_root", "models", "training_states", "log", "visualization")


class Session:
    """State shared by the replaced functions during one run.

    Args:
        argv: Command line without the program's name; ``sys.argv`` when None.
    """

    def __init__(self, argv: list[str] | None) -> None:
        self.argv = argv
        self.datasets: dict[str, Any] = {}
        self.args: argparse.Namespace
        self.resume_state: dict[str, Any] | None = None
        self.val_loaders: list[Any] = []
        self.progress = Progress()

    def __enter__(self) -> Session:
        forget_logger()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.progress.close()
        leave_distributed(orderly=error is None)

    # ------------------------------------------------------------------------------ before anything is written

    def parse_options(self, root_path: str, is_train: bool) -> tuple[dict[str, Any], argparse.Namespace]:
        """Options, data sets and checkpoints, all looked at before a folder is made."""
        opt, self.args = options.parse_options(root_path, is_train, self.argv)
        for name, dataset_opt in opt["datasets"].items():
            self.datasets[name] = self._make_dataset(name, dataset_opt, opt["manual_seed"])
        if is_train:
            self._require_a_batch(opt)
        model = registered(MODEL_REGISTRY)[opt["model_type"]]
        self.ours = issubclass(model, RestorationModel)
        if opt["dist"] and not self.ours and opt["num_gpu"] == 0:
            raise OptionError(
                f"--launcher: BasicSR's own {opt['model_type']} needs a GPU under a launcher; use KDModel"
            )
        if self.ours:  # BasicSR's models read files by rules of their own
            check_checkpoints(opt)
        if is_train:
            refuse_own_files(opt)
            rehearse(opt, model, self._make_dataset("train", opt["datasets"]["train"], opt["manual_seed"]))
        forget_logger()
        return opt, self.args

    def _make_dataset(self, name: str, dataset_opt: dict[str, Any], seed: int) -> SeededDataset:
        # Not BasicSR's build_dataset: it opens the log, whose file does not exist yet.
        cls = registered(DATASET_REGISTRY)[dataset_opt["type"]]
        try:
            return SeededDataset(cls(deepcopy(dataset_opt)), seed)
        except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
            what = f"the option {error} is missing" if isinstance(error, KeyError) else str(error)
            raise OptionError(f"datasets.{name}: {dataset_opt['type']} cannot be built: {what}") from error

    def _require_a_batch(self, opt: dict[str, Any]) -> None:
        train = opt["datasets"]["train"]
        images, ratio = len(self.datasets["train"]), train.get("dataset_enlarge_ratio", 1)
        needed = train["batch_size_per_gpu"] * opt["world_size"]
        if images * ratio < needed:
            raise OptionError(
                f"datasets.train: {images} images × dataset_enlarge_ratio {ratio} are fewer than one batch of "
                f"{needed}; raise dataset_enlarge_ratio or lower batch_size_per_gpu"
            )

    # ------------------------------------------------------------------------------ names of basicsr.train

    def load_resume_state(self, opt: dict[str, Any]) -> dict[str, Any] | None:
        """The newest state that loads (``--auto_resume``) or the one that ``path.resume_state`` names."""
        if opt["auto_resume"]:
            state, path = newest_state(Path(opt["path"]["training_states"]))
        else:
            path = Path(opt["path"]["resume_state"]) if opt["path"].get("resume_state") else None
            state = read_state(path) if path else None
        if state is None:
            return None
        opt["path"]["resume_state"] = str(path)
        if self.args.seed_is_drawn and state.get("manual_seed") is not None:
            opt["manual_seed"] = self.args.resolved["manual_seed"] = state["manual_seed"]
            for dataset in self.datasets.values():
                dataset.seed = state["manual_seed"]
        if not self.ours:
            # BasicSR's models find their weights through the options; ours have them in the state.
            check_resume(opt, state["iter"])
        self.resume_state = state
        return state

    def make_exp_dirs(self, opt: dict[str, Any]) -> None:
        """BasicSR's folders, and no others: it would make one for any entry of ``path`` that it does not know."""
        known = {key: value for key, value in opt["path"].items() if key in _FOLDERS}
        make_exp_dirs({**opt, "path": known})

    def copy_opt_file(self, opt_file: str, experiments_root: str) -> None:
        """Writes the resolved options beside the run."""
        if get_dist_info()[0] == 0:
            options.dump(self.args.resolved, Path(experiments_root) / Path(opt_file).name)

    def create_train_val_dataloader(
        self, opt: dict[str, Any], logger: Any
    ) -> tuple[Any, Any, list[Any], int, int]:
        """Loaders whose epochs add up to exactly ``total_iter`` steps."""
        train_opt = opt["datasets"]["train"]
        ratio = train_opt.get("dataset_enlarge_ratio", 1)
        train_set = self.datasets["train"]
        sampler = PositionSampler(train_set, opt["world_size"], opt["rank"], ratio, opt["manual_seed"])
        # Without prefetch_mode: its reading thread ("cpu") dies of an unreadable image in silence, and the run hangs.
        plain = {**train_opt, "prefetch_mode": None}
        loader = build_dataloader(train_set, plain, opt["num_gpu"], opt["dist"], sampler, opt["manual_seed"])
        # Else each start of an epoch draws from torch's global generator, and a resumed run starts one more.
        loader.generator = torch.Generator().manual_seed(opt["manual_seed"])
        for name, dataset_opt in opt["datasets"].items():
            if name.split("_")[0] == "val":
                dataset = self.datasets[name]
                self.val_loaders.append(build_dataloader(dataset, dataset_opt, opt["num_gpu"], opt["dist"]))
                logger.info(f"Number of val images/folders in {dataset_opt['name']}: {len(dataset)}")

        total_iters = int(opt["train"]["total_iter"])
        if self.resume_state:
            # Not the state's epoch: the length of one may have changed since.
            self.resume_state["epoch"], done = divmod(self.resume_state["iter"], len(loader))
            sampler.resume(self.resume_state["epoch"], done * train_opt["batch_size_per_gpu"])
        # The loop runs epochs 0..total inclusive; its own count mixes ceil with drop_last and stops early.
        total_epochs = math.ceil(total_iters / len(loader)) - 1
        logger.info(
            f"Training statistics:\n\tNumber of train images: {len(train_set)}\n\tDataset enlarge ratio: {ratio}"
            f"\n\tBatch size per process: {train_opt['batch_size_per_gpu']}\n\tProcesses: {opt['world_size']}"
            f"\n\tIterations per epoch: {len(loader)}\n\tTotal epochs: {total_epochs + 1}; iters: {total_iters}."
        )
        return loader, sampler, self.val_loaders, total_epochs, total_iters

    def build_model(self, opt: dict[str, Any]) -> Any:
        """Builds the model and measures the teacher once, before it teaches."""
        for warning in opt.get("warnings", ()):
            get_root_logger().warning(warning)
        model = build_model(opt)
        val = opt.get("val") or {}
        if val.get("teacher") and self.resume_state is None and hasattr(model, "validate_teacher"):
            model.validate_teacher(self.val_loaders)
        return model

    def make_prefetcher(self, loader: Any) -> TickingPrefetcher:
        return TickingPrefetcher(Batches(loader), self.progress)

    def make_cuda_prefetcher(self, loader: Any, opt: dict[str, Any]) -> TickingPrefetcher:
        if opt["num_gpu"] == 0:
            get_root_logger().warning("datasets.train.prefetch_mode: cuda has no effect on the CPU")
            return self.make_prefetcher(loader)
        return TickingPrefetcher(CUDAPrefetcher(loader, opt), self.progress)

    def make_message_logger(
        self, opt: dict[str, Any], start_iter: int, tb_logger: Any
    ) -> ProgressMessageLogger:
        return ProgressMessageLogger(opt, start_iter, tb_logger, self.progress)

    # ------------------------------------------------------------------------------ names of basicsr.test

    def build_dataset(self, dataset_opt: dict[str, Any]) -> Any:
        """The data set that was made, and checked, with the options."""
        return next(made for made in self.datasets.values() if made.opt["name"] == dataset_opt["name"])


def forget_logger() -> None:
    """Lets the next run open its own log file: BasicSR's logger keeps the first that it was given, or none."""
    if initialized_logger.pop("basicsr", None):
        for handler in list(logging.getLogger("basicsr").handlers):
            logging.getLogger("basicsr").removeHandler(handler)
            handler.close()


def read_state(path: Path) -> dict[str, Any]:
    """A training state, on the CPU.

    Raises:
        CheckpointError: When the file is missing or cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as a training state ({type(error).__name__})"
        ) from error


def newest_state(folder: Path) -> tuple[dict[str, Any] | None, Path | None]:
    """The newest state in ``folder`` that loads; says which newer ones it skipped."""
    named = [path for path in folder.glob("*.state") if path.stem.isdigit()] if folder.is_dir() else []
    for path in sorted(named, key=lambda path: int(path.stem), reverse=True):
        try:
            return read_state(path), path
        except CheckpointError as error:
            print(f"Skipping a state that does not load: {error}", flush=True)
    return None, None
