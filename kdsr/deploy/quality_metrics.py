"""Metrics of the package pyiqa (LPIPS, NIQE, ...) as metrics of ``val.metrics``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from basicsr.utils.registry import METRIC_REGISTRY

from kdsr.runtime.errors import OptionError
from kdsr.runtime.suggestions import nearest

_PREFIX = "pyiqa_"


def quality_metrics(names: Sequence[str], device: torch.device) -> dict[str, dict[str, Any]]:
    """Registers metrics of pyiqa, which downloads the weights that some need, and returns them as ``val.metrics``.

    They are computed of whole 8-bit images.

    Raises:
        OptionError: pyiqa is not installed, does not know a name, or cannot load the metric.
    """
    if names and find_spec("pyiqa") is None:
        raise OptionError(
            f"--metrics {' '.join(names)}: needs the package pyiqa, which is not there: pip install pyiqa"
        )
    found = {}
    for name in names:
        kind = f"{_PREFIX}{name}"
        if kind not in METRIC_REGISTRY:
            METRIC_REGISTRY._do_register(kind, _metric(name, device))
        found[name] = {"type": kind}
    return found


def _metric(name: str, device: torch.device) -> Any:
    pyiqa = importlib.import_module("pyiqa")
    if name not in (known := pyiqa.list_models()):
        raise OptionError(f"--metrics {name}: pyiqa has no such metric; {nearest(name, known)}")
    try:
        model = pyiqa.create_metric(name, device=device)
    except Exception as error:  # of the download, or of a library that the metric needs
        reason = (str(error).strip().splitlines() or [""])[0]
        raise OptionError(
            f"--metrics {name}: pyiqa cannot load it ({type(error).__name__}: {reason})"
        ) from error

    def as_input(image: np.ndarray) -> torch.Tensor:  # (H, W) or (H, W, 3), BGR, uint8 -> (1, 3, H, W), RGB
        colours = np.broadcast_to(image.reshape(*image.shape[:2], -1), (*image.shape[:2], 3))
        return torch.from_numpy(colours[..., ::-1].copy()).permute(2, 0, 1)[None].to(device) / 255

    def with_reference(img: np.ndarray, img2: np.ndarray) -> float:
        with torch.no_grad():
            return float(model(as_input(img), as_input(img2)))

    def without_reference(img: np.ndarray) -> float:
        with torch.no_grad():
            return float(model(as_input(img)))

    metric: Any = with_reference if model.metric_mode == "FR" else without_reference
    metric.better = "lower" if model.lower_better else "higher"
    return metric
