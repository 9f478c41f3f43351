"""Builds and checks the data sets of a run before anything is written."""

from __future__ import annotations

import math
import socket
from copy import deepcopy
from typing import Any

from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import DATASET_REGISTRY

from kdsr.data.batch_plan import BatchPlan
from kdsr.data.dataset_options import STOCK_DATASETS
from kdsr.data.image_roots import result_name, same_names
from kdsr.data.paired_patches import PairedPatches
from kdsr.data.pairing import keep_listed
from kdsr.data.ram_cache import CachedImages
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.options.signatures import registered
from kdsr.runtime.distributed import gather_lists
from kdsr.runtime.errors import OptionError
from kdsr.runtime.memory import free_shared_memory, gib

_SHARE_OF_MEMORY = 0.8  # of the free memory, for decoded images
LONGEST_EPOCH = 100_000_000  # positions; their permutation takes 800 MB


def make_dataset(name: str, dataset_opt: dict[str, Any], seed: int) -> SeededDataset:
    """Builds the data set ``datasets.<name>``.

    Raises:
        OptionError: It cannot be built.
    """
    # BasicSR's build_dataset would open the log before its file exists.
    cls = registered(DATASET_REGISTRY)[dataset_opt["type"]]
    try:
        training = name == "train"
        dataset = (PairedPatches if training and cls is PairedImageDataset else cls)(deepcopy(dataset_opt))
        if training and isinstance(dataset, CachedImages):
            dataset.whole_numbers = True
        if cls.__name__ in STOCK_DATASETS:
            keep_listed(dataset, dataset_opt)
        return SeededDataset(dataset, seed)
    except (KeyError, IndexError, TypeError, ValueError, AssertionError, OSError) as error:
        what = f"the option {error} is missing" if isinstance(error, KeyError) else str(error)
        raise OptionError(f"datasets.{name}: {dataset_opt['type']} cannot be built: {what}") from error


def whole_training_images(opt: dict[str, Any], with_outputs: bool) -> SeededDataset:
    """Builds the training set with whole images, and with the stored outputs of the teacher or without."""
    train = opt["datasets"]["train"]
    options = {key: value for key, value in train.items() if with_outputs or key != "teacher_images"}
    # a validation set may have the name of the training set
    options.update(phase="val", name=f"{train['name']}, training images")
    return make_dataset("train (whole images)", options, opt["manual_seed"])


def require_a_batch(opt: dict[str, Any], images: int) -> None:
    """Refuses a training set whose epoch is shorter than a batch, or too long to shuffle."""
    train = opt["datasets"]["train"]
    ratio = train.get("dataset_enlarge_ratio", 1)
    batches = opt["train"].get("accumulate", 1)
    needed = BatchPlan(train, batches).largest_batch * opt["world_size"]
    if images * ratio > LONGEST_EPOCH:
        raise OptionError(
            f"datasets.train: {images} images × dataset_enlarge_ratio {ratio} make an epoch of more than "
            f"{LONGEST_EPOCH:,d} positions, whose permutation does not fit into memory; lower dataset_enlarge_ratio"
        )
    if images * ratio < needed:
        raise OptionError(
            f"datasets.train: {images} images × dataset_enlarge_ratio {ratio} are fewer than one batch of "
            f"{needed}; raise dataset_enlarge_ratio or lower batch_size_per_gpu"
            f"{' or train.accumulate' if batches > 1 else ''}"
        )


def require_room_for_cache(train: dict[str, Any], dataset: SeededDataset) -> None:
    """Refuses ``cache: ram`` where the images of all processes of a node do not fit into its memory. Collective."""
    if train.get("cache") != "ram":
        return
    found = gather_lists([(socket.gethostname(), free_shared_memory())])
    needed = dataset.decoded_bytes()
    for node in dict.fromkeys(node for node, _ in found):
        free = [free for other, free in found if other == node]
        usable = min((_SHARE_OF_MEMORY * each for each in free if each is not None), default=math.inf)
        if needed * len(free) > usable:
            processes = f" for each of {len(free)} processes on {node}" if len(free) > 1 else ""
            raise OptionError(
                f"datasets.train.cache: ram needs {gib(needed)} of shared memory{processes}, but may take "
                f"{gib(usable)}, {_SHARE_OF_MEMORY:.0%} of what is free; remove it, use an LMDB, or in a container "
                "raise its memory and --shm-size"
            )


def require_unique_names(opt: dict[str, Any], datasets: dict[str, Any], ours: bool) -> None:
    """Refuses data sets in which the results of two images would have the same name.

    For kdsr's models the option check has already checked the types of data sets that it knows.
    """
    named: dict[str, list[tuple[str, str]]] = {}
    for key, dataset in datasets.items():
        if key.split("_")[0] == "train" or not isinstance(getattr(dataset, "paths", None), list):
            continue
        listed: list[Any] = [
            entry.get("lq_path") if isinstance(entry, dict) else entry for entry in dataset.paths
        ]
        paths = [path for path in listed if isinstance(path, str)]
        root = dataset.opt.get("dataroot_lq") or dataset.opt.get("dataroot_gt")
        if ours:
            named[f"datasets.{key}"] = [(result_name(path, root), path) for path in paths]
        elif (opt.get("val") or {}).get("save_img"):
            # BasicSR's own models ignore folders, and in training the data set's name too.
            place = "datasets" if opt["is_train"] else f"datasets.{key}"
            named.setdefault(place, []).extend((result_name(path, None), path) for path in paths)
    found = {place: same_names(names) for place, names in named.items()}
    problems = [f"{place}: {problem}" for place, problem in found.items() if problem]
    if problems:
        raise OptionError(problems)
