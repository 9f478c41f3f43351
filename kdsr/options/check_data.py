"""Checks the section ``datasets``: keys, loaders and files."""

from __future__ import annotations

from os.path import expanduser
from typing import Any

import basicsr.data  # noqa: F401  registers its data sets
from basicsr.utils.registry import DATASET_REGISTRY

from kdsr.data.batch_plan import BatchPlan, progressive_problems
from kdsr.data.checks import check_dataset
from kdsr.data.dataset_options import PAIRED, STOCK_DATASETS, DatasetOptions
from kdsr.options.check_roles import swap_warning
from kdsr.options.signatures import find_type, registered
from kdsr.runtime.declarations import Option, check_kind, check_section, is_kind


def check_datasets(opt: dict[str, Any], is_train: bool, problems: list[str], warnings: list[str]) -> None:
    """Checks every set of ``datasets`` and its files; a set that is null is ignored.

    ``warnings`` receives problems that do not stop the run, such as unreadable images with ``on_bad_image: skip``.
    """
    datasets = opt.get("datasets")
    if not isinstance(datasets, dict):
        return
    phases = ("train", "val") if is_train else ("test", "val")
    if is_train and not datasets.get("train"):
        problems.append("datasets.train: is required")
    if not any(datasets.values()):
        problems.append("datasets: has no data set")
    names: dict[str, str] = {}
    for key, dataset in datasets.items():
        place = f"datasets.{key}"
        phase = key.split("_")[0]
        if dataset is None:
            continue
        if phase not in phases or (phase == "train" and key != phase):  # one training set is read
            doing = "training" if is_train else "a test"
            known = " or ".join("train" if each == "train" else f"{each}, {each}_NAME" for each in phases)
            problems.append(f"{place}: {doing} knows sets named {known}")
            continue
        if not check_kind(dataset, dict, place, problems):
            continue
        before = len(problems)
        _check_keys(dataset, phase, place, problems)
        name = dataset.get("name")
        if isinstance(name, str) and phase != "train" and names.setdefault(name, place) != place:
            problems.append(
                f"{place}.name: {name} is also the name of {names[name]}; the names of sets must differ"
            )
        problems += progressive_problems(dataset, f"{place}.progressive")
        if len(problems) == before:
            found: list[str] = []
            if dataset.get("progressive"):  # the files must give the largest patches
                dataset = {**dataset, "gt_size": max(BatchPlan(dataset).patches, default=None)}
            problems += _look_at_files(dataset, phase, opt.get("scale"), place, found)
            warnings += [f"{place}.{warning}" for warning in found]
            swapped = swap_warning(dataset, place, opt.get("scale"))
            warnings += [swapped] if swapped else []
    _check_colors(datasets, problems)


def _check_colors(datasets: dict[str, Any], problems: list[str]) -> None:
    """Checks that all sets have the same ``color``: a network takes either one channel or three."""
    colors = {}
    for key, dataset in datasets.items():
        known = isinstance(dataset, dict) and declared_by(
            registered(DATASET_REGISTRY).get(str(dataset.get("type")))
        )
        if known and dataset.get("color") in (None, "y", "rgb"):
            colors[key] = dataset.get("color") or "rgb"
    first = next(iter(colors), "")
    problems += [
        f"datasets.{key}.color: is {color}, but datasets.{first} is {colors[first]}; a network takes one or the other: "
        + (f"set datasets.{key}.color: y" if color == "rgb" else f"remove datasets.{key}.color")
        for key, color in colors.items()
        if color != colors[first]
    ]


def _look_at_files(
    dataset: dict[str, Any], phase: str, scale: Any, place: str, warnings: list[str]
) -> list[str]:
    if scale is None and dataset["type"] in PAIRED:
        return [f"scale: is required by {place}, a {dataset['type']}"]
    scale = 1 if scale is None else scale
    if not (is_kind(scale, int) and scale >= 1):
        return []  # reported with the option itself
    scale = int(scale)
    named = ("dataroot_gt", "dataroot_lq", "meta_info_file")
    roots = {key: expanduser(dataset[key]) for key in named if dataset.get(key)}
    return [f"{place}.{problem}" for problem in check_dataset({**dataset, **roots}, scale, phase, warnings)]


def declared_by(cls: type | None) -> type[DatasetOptions] | None:
    """Returns the declarations of a data set's options, or None if there are none."""
    return STOCK_DATASETS.get(getattr(cls, "__name__", "")) or getattr(cls, "options", None)


def keys_of_dataset(kind: Any) -> dict[str, Option]:
    """Returns the known options of a type of data set."""
    return (declared_by(registered(DATASET_REGISTRY).get(str(kind))) or DatasetOptions).declared()


def _check_keys(dataset: dict[str, Any], phase: str, place: str, problems: list[str]) -> None:
    cls = find_type(dataset, registered(DATASET_REGISTRY), place, problems)
    declared = declared_by(cls)
    table = keys_of_dataset(dataset.get("type"))
    unjudged = ["progressive", *([] if declared else [key for key in dataset if key not in table])]
    check_section(dataset, table, place, problems, phase=phase, skip=unjudged)
    if isinstance(dataset.get("io_backend"), dict):
        _check_backend(dataset, f"{place}.io_backend", problems)
    if dataset.get("prefetch_mode") == "cuda" and dataset.get("pin_memory") is False:
        problems.append(f"{place}.pin_memory: must be true for prefetch_mode: cuda")
    ratio = dataset.get("dataset_enlarge_ratio")
    if phase == "train" and isinstance(ratio, float) and 0 < ratio < 1:
        problems.append(
            f"{place}.dataset_enlarge_ratio: {ratio} would omit the same images in every epoch; set 1"
        )
    if phase == "train" and dataset.get("use_shuffle") is False:
        problems.append(f"{place}.use_shuffle: training sets are always shuffled; remove it")
    if dataset.get("on_bad_image") == "skip" and phase != "train":
        problems.append(f"{place}.on_bad_image: only a training set can skip images; remove it")
    if dataset.get("cache") is not None and phase != "train":
        problems.append(f"{place}.cache: only a training set is cached; remove it")
    if declared is not None:
        _check_normalisation(dataset, place, problems)


def _check_backend(dataset: dict[str, Any], place: str, problems: list[str]) -> None:
    options = dataset["io_backend"]
    roots = [dataset[key] for key in ("dataroot_lq", "dataroot_gt") if key in dataset]
    for key, filled_in in (("db_paths", roots), ("client_keys", ["lq", "gt"][: len(roots)])):
        given = options.get(key, filled_in)
        if given not in (filled_in, filled_in[0] if len(filled_in) == 1 else None):
            problems.append(f"{place}.{key}: is set by the data set from its dataroot_*; remove it")
        elif key in options and options.get("type") == "disk":
            problems.append(f"{place}.{key}: is for LMDBs only; remove it, or set type: lmdb")


def _check_normalisation(dataset: dict[str, Any], place: str, problems: list[str]) -> None:
    """Checks ``mean`` and ``std``: both must be given, with one value per channel."""
    given = {key: dataset[key] for key in ("mean", "std") if isinstance(dataset.get(key), list)}
    channels = 1 if dataset.get("color") == "y" else 3
    for key, values in given.items():
        here, other = f"{place}.{key}", "std" if key == "mean" else "mean"
        if len(values) not in (1, channels):
            problems.append(f"{here}: {len(values)} values for images of {channels} channels")
        if other not in given:
            problems.append(f"{place}.{other}: is required by {key}")
