"""The part of the option check that looks for swapped folders and for sets that are normalised differently."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

# Words in the names of folders, without a plural's s. Left out are those that mean either (original, raw, reference).
_CLEAN = re.compile("gt|target|clean|clear|sharp|norain|groundtruth|hr|high|hq|label|nohaze|noblur")
_DEGRADED = re.compile(
    "lq|lr|input|low|rain|rainy|blur|blurred|blurry|noise|noisy|haze|hazy|fog|foggy|degraded|compressed"
)


def _leaning(parts: list[str]) -> int:
    """1 where the deepest folder with a known word names clean images, -1 for degraded ones, 0 for neither or both."""
    for part in reversed(parts):
        words = {word.removesuffix("s") for word in re.findall("[a-z]+", part.lower())}
        clean, degraded = (any(map(kind.fullmatch, words)) for kind in (_CLEAN, _DEGRADED))
        if clean or degraded:
            return clean - degraded
    return 0


def swap_warning(dataset: dict[str, Any], place: str, scale: Any) -> str | None:
    """The warning that ``dataroot_gt`` and ``dataroot_lq`` look swapped, by the names of their folders that differ.

    At other scales than 1 the sizes of the images show it.
    """
    roots = [dataset.get(key) for key in ("dataroot_gt", "dataroot_lq")]
    if scale not in (None, 1) or not all(isinstance(root, str) for root in roots):
        return None
    pairs = [pair for pair in zip_longest(*(Path(str(root)).parts for root in roots)) if len(set(pair)) == 2]
    gt, lq = (_leaning([pair[side] for pair in pairs if pair[side]]) for side in (0, 1))
    if not gt < 0 < lq:  # a name alone may be that of a benchmark: Rain13K, Sharp20
        return None
    return (
        f"{place}.dataroot_gt: {roots[0]} and {place}.dataroot_lq: {roots[1]} look swapped, by their names; "
        "dataroot_gt is the folder of the clean images"
    )


def normalisation_warnings(opt: dict[str, Any], ours: bool) -> list[str]:
    """Sets that are normalised unlike the training set, and what BasicSR's own models make of normalised ones."""
    datasets = {
        key: dataset for key, dataset in (opt.get("datasets") or {}).items() if isinstance(dataset, dict)
    }
    found = []
    for key, dataset in datasets.items():
        if key == "train":
            continue
        if not ours and dataset.get("mean") is not None:
            found.append(
                f"datasets.{key}.mean: BasicSR's {opt.get('model_type')} measures and saves normalised images; "
                "KDModel undoes mean and std first"
            )
        train = datasets.get("train")
        if train and any(dataset.get(name) != train.get(name) for name in ("mean", "std")):
            found.append(
                f"datasets.{key}.mean, std: not those of datasets.train; the network is validated on other values than "
                "it is trained on"
            )
    return found
