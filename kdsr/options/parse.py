"""Parses the command line and checks the options; replaces ``basicsr.utils.options.parse_options``.

Differences from BasicSR: object tags and overrides never execute code, unknown keys are errors, the seed is drawn after
the overrides and shared by all ranks, ``dist_params`` applies to every launcher, and ``num_gpu`` is limited to the GPUs
of the machine. All checks precede the process group and any written file.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from os import path as osp
from typing import Any

import torch
from basicsr.utils import set_random_seed
from basicsr.utils.dist_util import get_dist_info
from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.cached_teacher import name_teacher_images
from kdsr.models.image_metrics import better_of
from kdsr.models.sections import LoggerOptions, LoopOptions, StockLoggerOptions, StockValOptions
from kdsr.options.authors import translate
from kdsr.options.check import check
from kdsr.options.check_data import keys_of_dataset
from kdsr.options.command_line import parse_arguments
from kdsr.options.dump import user_level
from kdsr.options.files import load_with_origin
from kdsr.options.model_keys import ModelKeys
from kdsr.options.overrides import overrides_of
from kdsr.options.signatures import registered
from kdsr.options.tested_run import as_test, has_training_set, is_test_only, option_file_of
from kdsr.options.user_modules import import_user_modules
from kdsr.runtime.cpu_cores import cores_of_this_node, workers_warning
from kdsr.runtime.declarations import Options, whole_numbers
from kdsr.runtime.distributed import DistOptions, init_distributed
from kdsr.runtime.errors import OptionError


def _resolve_num_gpu(
    requested: Any, *, ours: bool, args: argparse.Namespace, is_train: bool, warnings: list[str]
) -> int:
    """Returns the number of GPUs that this process uses, 0 or 1.

    Without a launcher, more than one GPU is an error in composed files and overrides; for other files, such as stock
    BasicSR's, it is a warning.
    """
    count = torch.cuda.device_count()
    if requested == "auto":
        return min(count, 1)
    if args.launcher != "none":
        return min(requested, count, 1)
    if requested > 1 and ours:
        script = "kdsr/train.py" if is_train else "kdsr/test.py"
        raise OptionError(
            f"num_gpu: {requested} needs a launcher; start it with\n  torchrun --nproc_per_node={requested} {script} "
            f"-opt {args.opt} --launcher pytorch\nor set num_gpu: auto for one GPU or the CPU"
        )
    used = min(requested, count, 1)
    if used != requested:
        have = "one GPU" if used else "the CPU"
        more = "; several need --launcher pytorch under torchrun" if requested > 1 and count > 1 else ""
        warnings.append(f"num_gpu: {requested} was requested, the run uses {have}{more}")
    return used


def _shared_seed(seed: int | None, world_size: int) -> int:
    """Returns the given seed, or a random one that all ranks share."""
    if seed is not None:
        return seed
    box = [random.SystemRandom().randrange(1, 2**31)]
    if world_size > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _make_counts_whole(opt: dict[str, Any]) -> None:
    """Converts whole floats to ints in options that take integers; other values are unchanged."""
    keys = ModelKeys(registered(MODEL_REGISTRY).get(str(opt.get("model_type"))))
    opt.update(whole_numbers(opt, keys.top))
    for section, declared in (
        ("train", LoopOptions.declared() | keys.train),
        ("val", keys.val),
        ("logger", LoggerOptions.declared()),
        ("dist_params", DistOptions.declared()),
    ):
        if isinstance(opt.get(section), dict):
            opt[section] = whole_numbers(opt[section], declared)
    datasets: Any = opt.get("datasets")
    for key, dataset in datasets.items() if isinstance(datasets, dict) else ():
        if isinstance(dataset, dict):
            datasets[key] = whole_numbers(dataset, keys_of_dataset(dataset.get("type")))


def _defaults(declared: type[Options], keys: Sequence[str]) -> dict[str, Any]:
    return {key: declared.declared()[key].default for key in keys}


def _fill_datasets(opt: dict[str, Any]) -> None:
    opt["datasets"] = {name: dataset for name, dataset in opt["datasets"].items() if dataset is not None}
    for name, dataset in opt["datasets"].items():
        dataset["phase"] = name.split("_")[0]
        if dataset["phase"] != "train":
            # These sets are read without workers. BasicSR's "cpu" prefetcher hangs on an image that cannot be
            # read, and torch refuses persistent workers without workers.
            for key in ("prefetch_mode", "persistent_workers"):
                dataset.pop(key, None)
        if "scale" in opt:
            dataset["scale"] = opt["scale"]
        for key in ("dataroot_gt", "dataroot_lq", "meta_info_file"):
            if dataset.get(key) is not None:
                dataset[key] = osp.expanduser(dataset[key])
        if dataset.get("meta_info_file", "") is None:
            del dataset["meta_info_file"]  # BasicSR's SingleImageDataset would open null


def _fill_paths(opt: dict[str, Any], root_path: str, is_train: bool) -> None:
    path = opt["path"]
    for key, value in path.items():
        if isinstance(value, str):
            path[key] = osp.expanduser(value)
        elif isinstance(value, list):
            path[key] = [osp.expanduser(item) if isinstance(item, str) else item for item in value]
    kind, other = ("experiments", "results") if is_train else ("results", "experiments")
    path.pop(f"{other}_root", None)  # BasicSR would create a folder of this name
    run = osp.join(osp.abspath(path.get(f"{kind}_root") or osp.join(root_path, kind)), opt["name"])
    path[f"{kind}_root"] = path["log"] = run
    path["visualization"] = osp.join(run, "visualization")
    if is_train:
        path["models"] = osp.join(run, "models")
        path["training_states"] = osp.join(run, "training_states")


def _apply_debug(opt: dict[str, Any]) -> None:
    """Applies BasicSR's debug mode: log every step, validate and save every 8 steps."""
    if opt.get("val"):
        opt["val"]["val_freq"] = 8
    opt["logger"]["print_freq"] = 1
    opt["logger"]["save_checkpoint_freq"] = 8


def warn(opt: dict[str, Any], warnings: Iterable[str | None]) -> None:
    """Prints warnings before the log is open, and stores them in ``opt["warnings"]`` for the log file."""
    for warning in filter(None, warnings):
        opt["warnings"].append(warning)
        if opt["rank"] == 0:
            print(f"Warning: {warning}", file=sys.stderr, flush=True)


def parse_options(
    root_path: str, is_train: bool = True, argv: Sequence[str] | None = None
) -> tuple[dict[str, Any], argparse.Namespace]:
    """Parses the command line and the option file, checks them, joins the process group and sets the seed.

    Args:
        root_path: Folder for ``experiments/NAME`` or ``results/NAME``, unless ``path.experiments_root`` or
            ``path.results_root`` is given; the entry points pass the working directory.
        is_train: Training, or testing.
        argv: The arguments; those of the process by default.

    Returns:
        ``opt`` as BasicSR's loops and models expect it, and the arguments. ``args.resolved`` holds the resolved options
        with the seed, for :func:`dump`; ``args.notes`` holds lines for the log.

    Raises:
        OptionError: All problems at once, before anything is built or written.
    """
    args = parse_arguments(is_train, argv)
    overrides = args.force_yml
    given = args.opt
    if not is_train:
        args.opt = option_file_of(given)
    opt, composed = load_with_origin(args.opt, overrides)
    if args.debug and isinstance(opt.get("name"), str) and not opt["name"].startswith("debug"):
        opt["name"] = f"debug_{opt['name']}"
    warnings: list[str] = []
    problems = translate(opt, warnings)
    args.notes = []
    if is_train and is_test_only(opt):
        raise OptionError(
            f"{args.opt} describes a test (it has no datasets.train): use kdsr test -opt {args.opt}"
        )
    if not is_train and has_training_set(opt):
        opt, args.notes = as_test(opt, given, args, root_path, problems)
    import_user_modules(opt, args.opt, warnings)
    _make_counts_whole(opt)
    may_lack_weights = not is_train and (args.random_weights or bool(problems))  # as_test() reports them
    problems += check(opt, is_train, warnings, may_lack_weights)
    if problems:
        raise OptionError(problems)

    if opt.get("scale") is None:
        opt.pop("scale", None)
    overridden = bool(overrides_of(overrides, "num_gpu"))
    num_gpu = _resolve_num_gpu(
        opt.get("num_gpu", "auto"),
        ours=composed or overridden,
        args=args,
        is_train=is_train,
        warnings=warnings,
    )

    opt["dist"] = args.launcher != "none"
    if opt["dist"]:
        cpu_backend = {"backend": "gloo"} if num_gpu == 0 else {}  # even if the file has nccl
        init_distributed(args.launcher, {**(opt.get("dist_params") or {}), **cpu_backend})
    opt["rank"], opt["world_size"] = get_dist_info()
    if is_train:
        workers = workers_warning(opt["datasets"]["train"]["num_worker_per_gpu"], cores_of_this_node())
        warnings += [workers] if workers else []
    args.seed_is_drawn = opt.get("manual_seed") is None
    opt["manual_seed"] = _shared_seed(opt.get("manual_seed"), opt["world_size"])
    set_random_seed(opt["manual_seed"] + opt["rank"])
    args.resolved = user_level(opt)

    opt.update(num_gpu=num_gpu, auto_resume=args.auto_resume, is_train=is_train, warnings=[])
    opt["path"] = opt.get("path") or {}
    if is_train:
        # BasicSR's loop reads these without a default
        opt["logger"] = _defaults(
            StockLoggerOptions, ("print_freq", "save_checkpoint_freq", "use_tb_logger")
        ) | (opt.get("logger") or {})
    if opt.get("val"):
        opt["val"] = _defaults(StockValOptions, ("save_img", "suffix")) | opt["val"]
        for metric in (opt["val"].get("metrics") or {}).values():
            if better_of(metric) == "lower":
                metric["better"] = "lower"  # BasicSR's default is higher, for any metric
    _fill_datasets(opt)
    _fill_paths(opt, root_path, is_train)
    if is_train:
        name_teacher_images(opt)
    if is_train and "debug" in opt["name"]:
        _apply_debug(opt)
    warn(opt, warnings)
    return opt, args
