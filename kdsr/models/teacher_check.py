"""Warns of a teacher that is worse than bicubic interpolation, or than its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdsr.models.evaluation import ImageResult
from kdsr.models.image_metrics import baseline_name, needs_reference
from kdsr.models.sections import ValOptions


def teacher_warnings(results: Mapping[str, list[ImageResult]], opt: Mapping[str, Any]) -> list[str]:
    """One warning of several lines for each set on which the teacher is worse than the baseline.

    Compared are the means of the metrics that look at the ground truth, over the images that have both values.

    Args:
        results: The teacher's, with the baseline's values, by set.
        opt: The parsed options; with ``val.teacher_check: false`` there are no warnings.
    """
    val = opt.get("val") or {}
    if not ValOptions.read(val).teacher_check:
        return []
    scale = opt.get("scale") or 1
    found = []
    for name, of_images in results.items():
        worse = []
        for key, metric in (val.get("metrics") or {}).items():
            both = [
                (r.values[key], r.baseline[key]) for r in of_images if key in r.values and key in r.baseline
            ]
            if not both or not needs_reference(metric):
                continue
            teacher, baseline = (float(value) for value in np.mean(both, axis=0))
            below = teacher > baseline if metric.get("better") == "lower" else teacher < baseline
            if below:
                worse.append(f"{key} {teacher:.4f} ({baseline_name(scale)} {baseline:.4f})")
        if worse:
            found.append(_warning(name, len(of_images), worse, scale))
    return found


def _warning(dataset: str, images: int, worse: list[str], scale: int) -> str:
    than = "bicubic interpolation" if scale > 1 else "its input"
    swapped = "dataroot_gt and dataroot_lq swapped" if scale == 1 else f"another scale than {scale}"
    return (
        f"THE TEACHER IS WORSE THAN {than.upper()} on {dataset} ({images} image{'s' * (images > 1)}): "
        f"{', '.join(worse)}\n"
        "\tA student would learn its mistakes. Likely causes:\n"
        "\t- value range: the weights were trained with another one (network_t.img_range, mean and std of the data)\n"
        "\t- channel order: the weights were trained on BGR images, they get RGB\n"
        f"\t- {swapped}\n"
        "\t- the wrong file, or the wrong weights in it (path.pretrain_network_t, path.param_key_t)\n"
        "\tA teacher that was trained with a GAN may be worse on purpose; val.teacher_check: false turns this off."
    )
