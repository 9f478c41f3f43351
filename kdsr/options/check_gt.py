"""Checks for losses that need ground truth where the training set has none."""

from __future__ import annotations

from typing import Any

from basicsr.utils.registry import DATASET_REGISTRY

from kdsr.data.dataset_options import WITHOUT_GT
from kdsr.models.trainer import LoopInterface
from kdsr.options.signatures import registered
from kdsr.options.stock import STOCK_GT_KEYS, STOCK_MODELS


def gives_gt(kind: Any) -> bool:
    """Whether a type of data set gives ground truth; True for data sets without ``GIVES_GT``."""
    if kind in WITHOUT_GT:
        return False
    return bool(getattr(registered(DATASET_REGISTRY).get(str(kind)), "GIVES_GT", True))


def check_ground_truth(opt: dict[str, Any], model: type | None, problems: list[str]) -> None:
    """Reports losses that need ground truth if the training set has none."""
    datasets = opt.get("datasets")
    dataset = datasets.get("train") if isinstance(datasets, dict) else None
    if isinstance(dataset, dict) and not gives_gt(dataset.get("type")):
        problems += ground_truth_problems(opt, model)


def ground_truth_problems(opt: dict[str, Any], model: type | None) -> list[str]:
    """Returns a message for each key of ``train`` that needs ground truth."""
    train = opt.get("train")
    if model is None or not isinstance(train, dict):
        return []
    needing: dict[str, str] = {}
    if issubclass(model, LoopInterface):
        needing = model.keys_with_gt(train)
    elif model.__name__ in STOCK_MODELS:
        needing = {key: "remove it" for key in STOCK_GT_KEYS if train.get(key)}
    kind = opt["datasets"]["train"].get("type")
    return [
        f"train.{key}: needs ground truth, which datasets.train ({kind}) does not have; {remedy}, or use a paired set"
        for key, remedy in needing.items()
    ]
