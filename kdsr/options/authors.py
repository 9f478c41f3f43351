"""Translates option names of NAFNet's and Restormer's code to those of kdsr, before the option check.

NAFNet: github.com/megvii-research/NAFNet. Restormer: github.com/swz30/Restormer. Their remaining keys are
declared with kdsr's options.
"""

from __future__ import annotations

from typing import Any

from kdsr.data.dataset_options import MIRRORED, PAIRED
from kdsr.runtime.declarations import is_kind

CLIP_NORM = 0.01  # the value of use_grad_clip in both
_STAGES = ("iters", "gt_sizes", "mini_batch_sizes")


def translate(opt: dict[str, Any], warnings: list[str]) -> list[str]:
    """Renames options in place.

    Args:
        opt: The options as in the option file.
        warnings: Receives options that are accepted without effect.

    Returns:
        Problems: two names of one option with different values.
    """
    problems: list[str] = []
    train = _section(opt, "train")
    if opt.get("model_type") == "ImageRestorationModel" and train:
        train.setdefault("use_grad_clip", True)  # NAFNet's default
    if isinstance(train.get("use_grad_clip"), bool):
        if train.pop("use_grad_clip"):
            train.setdefault("clip_grad_norm", CLIP_NORM)
        elif train.get("clip_grad_norm") is not None:
            problems.append("train.use_grad_clip: false contradicts train.clip_grad_norm; remove one of them")
        else:
            train["clip_grad_norm"] = None  # stays off when the resolved options are read again
    datasets = _section(opt, "datasets")
    for key in datasets:
        _translate_dataset(_section(datasets, key), f"datasets.{key}", problems)
    _warn_of_validation(_section(opt, "val"), warnings)
    return problems


def _section(options: dict[str, Any], key: str) -> dict[str, Any]:
    return options[key] if isinstance(options.get(key), dict) else {}


def _translate_dataset(dataset: dict[str, Any], place: str, problems: list[str]) -> None:
    if str(dataset.get("type")) not in {*PAIRED, *MIRRORED}:  # other data sets may have keys of this name
        return
    if dataset.get("type") == "Dataset_GaussianDenoising":
        dataset.pop("dataroot_lq", None)  # "none": the noise is added here
    for theirs, ours in (("use_flip", ["use_hflip"]), ("geometric_augs", ["use_hflip", "use_rot"])):
        if theirs not in dataset:
            continue
        value = dataset.pop(theirs)
        problems += [
            f"{place}.{theirs}: is another name of {key}, which is {dataset[key]}; remove one of them"
            for key in ours
            if dataset.setdefault(key, value) != value
        ]
    if any(key in dataset for key in _STAGES):
        _translate_stages(dataset, place, problems)


def _translate_stages(dataset: dict[str, Any], place: str, problems: list[str]) -> None:
    """Converts Restormer's growing patches to ``progressive``; its ``iters`` are the lengths of the stages."""
    stages = [dataset.get(key) for key in _STAGES]
    counts = {
        len(stage) if isinstance(stage, list) and all(is_kind(n, int) for n in stage) else 0
        for stage in stages
    }
    if len(counts) > 1 or counts == {0} or dataset.get("progressive"):
        names = ", ".join(_STAGES)
        problems.append(f"{place}: {names} must be lists of integers of the same length, without progressive")
        return
    if not all(is_kind(dataset.get(key, 1), int) for key in ("gt_size", "batch_size_per_gpu")):
        return  # reported where it stands
    after, found = 0, []
    for length, size, batch in zip(*(dataset.pop(key) for key in _STAGES), strict=True):
        # its loop crops smaller patches and batches from those of the data set
        size, batch = (
            min(size, dataset.get("gt_size", size)),
            min(batch, dataset.get("batch_size_per_gpu", batch)),
        )
        found.append({"after": after, "gt_size": size, "batch_size_per_gpu": batch})
        after += length
    first, *later = found
    del first["after"]
    dataset.update(first)
    if later:
        dataset["progressive"] = later


def _warn_of_validation(val: dict[str, Any], warnings: list[str]) -> None:
    if val.get("grids"):
        warnings.append(
            "val.grids: images are restored whole, not as the mean of overlapping crops; val.tile restores tiles, "
            "whose results differ from that mean"
        )
    if val.get("use_image") is False and val.get("metrics"):
        warnings.append("val.use_image: false has no effect; metrics are those of 8-bit images")
    if val.get("rgb2bgr") is False:
        warnings.append(
            "val.rgb2bgr: false has no effect; images are measured and saved in their true colours"
        )
