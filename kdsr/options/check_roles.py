"""Warns about swapped folders and about sets with different normalisation."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

# Words in folder names, in the singular. Ambiguous ones (original, raw, reference) are left out.
_CLEAN = re.compile("gt|target|clean|clear|sharp|norain|groundtruth|hr|high|hq|label|nohaze|noblur")
_DEGRADED = re.compile(
    "lq|lr|input|low|rain|rainy|blur|blurred|blurry|noise|noisy|haze|hazy|fog|foggy|degraded|compressed"
)


def _leaning(parts: list[str]) -> int:
    """Returns 1 if the deepest folder with a known word names clean images, -1 for degraded ones, 0 if unclear."""
    for part in reversed(parts):
        words = {word.removesuffix("s") for word in re.findall("[a-z]+", part.lower())}
        clean, degraded = (any(map(kind.fullmatch, words)) for kind in (_CLEAN, _DEGRADED))
        if clean or degraded:
            return clean - degraded
    return 0


def swap_warning(dataset: dict[str, Any], place: str, scale: Any) -> str | None:
    """Returns a warning if the folder names of ``dataroot_gt`` and ``dataroot_lq`` look swapped.

    Only for scale 1; at other scales the image sizes are checked.
    """
    roots = [dataset.get(key) for key in ("dataroot_gt", "dataroot_lq")]
    if scale not in (None, 1) or not all(isinstance(root, str) for root in roots):
        return None
    pairs = [pair for pair in zip_longest(*(Path(str(root)).parts for root in roots)) if len(set(pair)) == 2]
    gt, lq = (_leaning([pair[side] for pair in pairs if pair[side]]) for side in (0, 1))
    if not gt < 0 < lq:  # one name alone may be a benchmark's: Rain13K, Sharp20
        return None
    return (
        f"{place}.dataroot_gt: {roots[0]} and {place}.dataroot_lq: {roots[1]} look swapped; "
        "dataroot_gt is the folder of the clean images"
    )


def normalisation_warnings(opt: dict[str, Any], ours: bool) -> list[str]:
    """Warns about normalisation unlike the training set's, and about normalised sets in BasicSR's models."""
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
                f"datasets.{key}.mean, std: differ from datasets.train; the network is validated on other values than "
                "it is trained on"
            )
    return found
