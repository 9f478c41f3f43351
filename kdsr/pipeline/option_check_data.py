"""The part of the option check that looks at ``datasets``: keys, loaders, and the files behind them."""

from __future__ import annotations

import math
from os.path import expanduser, isabs
from typing import Any

import basicsr.data  # noqa: F401  registers its data sets
from basicsr.utils.registry import DATASET_REGISTRY

from kdsr.data.batch_plan import BatchPlan, progressive_problems
from kdsr.data.checks import check_dataset
from kdsr.pipeline import option_tables as tables
from kdsr.pipeline.option_names import check_kind, check_table, find_type, is_kind, nearest, registered

# key, lowest, highest; beyond these a machine is busy with starting processes, or a number has slipped
_LOADER_LIMITS = (
    ("batch_size_per_gpu", 1, 100_000),
    ("num_worker_per_gpu", 0, 256),
    ("num_prefetch_queue", 1, 1000),
)


def check_datasets(
    opt: dict[str, Any], is_train: bool, problems: list[str], warnings: list[str] | None = None
) -> None:
    """Checks every set of ``datasets`` and asks whether its files are there; null switches a set off.

    ``warnings`` gets what a run can live with: unreadable training images that it has been told to skip.
    """
    datasets = opt.get("datasets")
    if not isinstance(datasets, dict):
        return
    phases = ("train", "val") if is_train else ("test", "val")
    if is_train and not datasets.get("train"):
        problems.append("datasets.train: is required")
    if not any(datasets.values()):
        problems.append("datasets: names no set")
    names: dict[str, str] = {}
    for key, dataset in datasets.items():
        place = f"datasets.{key}"
        phase = key.split("_")[0]
        if dataset is None:
            continue
        if phase not in phases:
            doing = "training" if is_train else "a test"
            known = " or ".join(f"{phase}, {phase}_NAME" for phase in phases)
            problems.append(f"{place}: {doing} knows sets named {known}")
            continue
        if not check_kind(dataset, dict, place, problems):
            continue
        before = len(problems)
        _check_keys(dataset, phase, place, problems)
        name = dataset.get("name")
        if isinstance(name, str) and phase != "train" and ("/" in name or name in ("", ".", "..")):
            problems.append(
                f"{place}.name: {name!r} must be the name of a folder, not a path; results lie in it"
            )
        if isinstance(name, str) and phase != "train" and names.setdefault(name, place) != place:
            problems.append(f"{place}.name: {name} names {names[name]} too; results are told apart by it")
        if isinstance(name, str) and (isabs(name) or ".." in name.split("/")):
            problems.append(
                f"{place}.name: {name} leads out of the folder in which restored images are saved"
            )
        problems += progressive_problems(dataset, f"{place}.progressive")
        if len(problems) == before:
            found: list[str] = []
            if dataset.get("progressive"):  # the files must give the largest patches
                dataset = {**dataset, "gt_size": max(BatchPlan(dataset).patches, default=None)}
            problems += _look_at_files(dataset, phase, opt.get("scale"), place, found)
            if warnings is not None:
                warnings += [f"{place}.{warning}" for warning in found]


def _look_at_files(
    dataset: dict[str, Any], phase: str, scale: Any, place: str, warnings: list[str]
) -> list[str]:
    if scale is None and dataset["type"] == "PairedImageDataset":
        return [f"scale: is required by {place}, a {dataset['type']}"]
    scale = 1 if scale is None else scale
    if not (is_kind(scale, int) and scale >= 1):
        return []  # reported where it stands
    scale = int(scale)
    roots = {key: expanduser(dataset[key]) for key in ("dataroot_gt", "dataroot_lq") if dataset.get(key)}
    return [f"{place}.{problem}" for problem in check_dataset({**dataset, **roots}, scale, phase, warnings)]


def _check_keys(dataset: dict[str, Any], phase: str, place: str, problems: list[str]) -> None:
    known = registered(DATASET_REGISTRY)
    cls = find_type(dataset, known, place, problems)
    required = ["name"]
    if phase == "train":
        required += ["batch_size_per_gpu", "num_worker_per_gpu"]
    declared: dict[str, Any] | None = None
    if cls is not None and cls.__name__ in tables.STOCK_DATASETS:
        declared, always, in_training = tables.STOCK_DATASETS[cls.__name__]
        required += [*always, "io_backend"]
        required += in_training if phase == "train" else ()
    elif cls is not None and hasattr(cls, "OPTION_KEYS"):
        declared = {}
        for base in reversed(cls.__mro__):
            declared |= vars(base).get("OPTION_KEYS", {})
    table = tables.ANY_DATASET | (declared or {})
    unjudged = [] if declared is not None else [key for key in dataset if key not in table]
    check_table(dataset, table, place, problems, required=required, skip=[*unjudged, "io_backend"])
    if "io_backend" in dataset and check_kind(dataset["io_backend"], dict, f"{place}.io_backend", problems):
        _check_backend(dataset["io_backend"], f"{place}.io_backend", problems)
    _check_loader(dataset, place, problems)
    choice = dataset.get("on_bad_image", "stop")
    if choice not in ("stop", "skip"):
        problems.append(f"{place}.on_bad_image: {choice!r} is neither stop nor skip")
    elif choice == "skip" and phase != "train":
        problems.append(f"{place}.on_bad_image: only a training set can skip; here every image counts")


def _check_backend(options: dict[str, Any], place: str, problems: list[str]) -> None:
    backend = options.get("type")
    if backend is None:
        problems.append(f"{place}.type: is required")
    elif backend not in tables.IO_BACKENDS:
        offer = nearest(str(backend), tables.IO_BACKENDS)
        problems.append(f"{place}.type: {backend!r} is not known; {offer}")
    check_table(options, tables.IO_BACKEND, place, problems, skip=["type"])


def _check_loader(dataset: dict[str, Any], place: str, problems: list[str]) -> None:
    for key, lowest, highest in _LOADER_LIMITS:
        value = dataset.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and not lowest <= value <= highest:
            limit = f"below {lowest}" if value < lowest else f"above {highest:,d}"
            problems.append(f"{place}.{key}: {value} is {limit}")
    ratio = dataset.get("dataset_enlarge_ratio")
    if isinstance(ratio, int | float) and not 0 < ratio < math.inf:
        limit = "too much" if ratio > 0 else "not above 0"
        problems.append(f"{place}.dataset_enlarge_ratio: {ratio} is {limit}")
    mode = dataset.get("prefetch_mode")
    if mode not in (None, "cpu", "cuda"):
        problems.append(f"{place}.prefetch_mode: {mode!r} is neither cpu nor cuda nor null")
    elif mode == "cuda" and dataset.get("pin_memory") is not True:
        problems.append(f"{place}.pin_memory: must be true for prefetch_mode: cuda")
