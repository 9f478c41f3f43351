"""The part of the option check that asks for ground truth: losses that compare with it, sets that have none."""

from __future__ import annotations

from typing import Any

from basicsr.utils.registry import DATASET_REGISTRY

from kdsr.data.dataset_options import WITHOUT_GT
from kdsr.models.trainer import LoopInterface
from kdsr.options.signatures import registered
from kdsr.options.stock import STOCK_GT_KEYS, STOCK_MODELS


def gives_gt(kind: Any) -> bool:
    """Whether a type of data set gives ground truth, as far as it says so: a foreign one is taken to do."""
    if kind in WITHOUT_GT:
        return False
    return bool(getattr(registered(DATASET_REGISTRY).get(str(kind)), "GIVES_GT", True))


def check_ground_truth(opt: dict[str, Any], model: type | None, problems: list[str]) -> None:
    """Reports what compares with the ground truth where the training set is one that has none."""
    datasets = opt.get("datasets")
    dataset = datasets.get("train") if isinstance(datasets, dict) else None
    if isinstance(dataset, dict) and not gives_gt(dataset.get("type")):
        problems += ground_truth_problems(opt, model)


def ground_truth_problems(opt: dict[str, Any], model: type | None) -> list[str]:
    """What of ``train`` cannot do without the ground truth that ``datasets.train`` does not give."""
    train = opt.get("train")
    if model is None or not isinstance(train, dict):
        return []
    needing: dict[str, str] = {}
    if issubclass(model, LoopInterface):
        needing = model.keys_with_gt(train)
    elif model.__name__ in STOCK_MODELS:
        needing = {key: "take it out" for key in STOCK_GT_KEYS if train.get(key)}
    kind = opt["datasets"]["train"].get("type")
    return [
        f"train.{key}: needs ground truth, which datasets.train ({kind}) has not; {cure}, or give a paired set"
        for key, cure in needing.items()
    ]
