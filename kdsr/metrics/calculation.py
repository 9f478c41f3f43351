"""Metrics as the options name them: their values, and whether higher or lower ones are better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import basicsr.metrics
from basicsr.utils.registry import METRIC_REGISTRY

_BETTER = {"calculate_psnr": "higher", "calculate_ssim": "higher", "calculate_niqe": "lower"}


def better_of(metric: Mapping[str, Any]) -> str | None:
    """Which values of a metric of ``val.metrics`` are better, ``higher`` or ``lower``; None where it is not declared.

    The option ``better`` counts first, then the attribute ``better`` of a registered function or class.
    (BasicSR takes higher values of any metric for better, those of NIQE as well.)
    """
    kind = str(metric.get("type"))
    entry = dict(iter(METRIC_REGISTRY)).get(kind)
    for direction in (metric.get("better"), _BETTER.get(kind), getattr(entry, "better", None)):
        if direction in ("higher", "lower"):
            return direction
    return None


def calculate_metric(images: Mapping[str, Any], metric: Mapping[str, Any]) -> Any:
    """BasicSR's ``calculate_metric``, without passing ``better``, which is no argument of a metric.

    Args:
        images: ``img`` and, for a metric with a reference, ``img2``: (H, W, C) or (H, W), BGR, 8 bits.
        metric: One entry of ``val.metrics``.
    """
    arguments = {key: value for key, value in metric.items() if key != "better"}
    return basicsr.metrics.calculate_metric(images, arguments)
