"""Checks the section ``logger``: its keys, and the set and metric of ``save_best``."""

from __future__ import annotations

import importlib.util
from typing import Any

from basicsr.utils.registry import METRIC_REGISTRY

from kdsr.models.image_metrics import better_of
from kdsr.options.check_gt import gives_gt
from kdsr.options.model_keys import ModelKeys
from kdsr.options.signatures import options_of, registered
from kdsr.runtime.declarations import check_section
from kdsr.runtime.suggestions import nearest


def check_logger(opt: dict[str, Any], keys: ModelKeys, problems: list[str]) -> None:
    """Checks ``logger``.

    Args:
        opt: The option tree.
        keys: The keys of the model.
        problems: Receives the problems.
    """
    logger = opt.get("logger")
    if not isinstance(logger, dict):
        return
    check_section(logger, keys.logger, "logger", problems)
    wandb = logger.get("wandb")
    if isinstance(wandb, dict) and wandb.get("project") is not None:
        if logger.get("use_tb_logger") is not True:
            problems.append("logger.use_tb_logger: must be true for logger.wandb.project")
        if importlib.util.find_spec("wandb") is None:
            problems.append("logger.wandb.project: wandb is not installed (pip install wandb)")
    elif isinstance(wandb, dict) and wandb.get("resume_id") is not None:
        problems.append("logger.wandb.resume_id: has no effect without logger.wandb.project")
    best = logger.get("save_best")
    if not keys.ours or not isinstance(best, dict):
        return
    val, datasets = opt.get("val"), opt.get("datasets")
    metrics = val.get("metrics") if isinstance(val, dict) else None
    sets = [
        dataset.get("name")
        for key, dataset in (datasets.items() if isinstance(datasets, dict) else ())
        if str(key).startswith("val") and isinstance(dataset, dict)
    ]
    for key, offer, what in (
        ("set", sets, "the name of a validation set"),
        ("metric", list(metrics) if isinstance(metrics, dict) else [], "in val.metrics"),
    ):
        value = best.get(key)
        if value not in offer:
            problems.append(
                f"logger.save_best.{key}: {value!r} is not {what}; {nearest(str(value), map(str, offer))}"
            )
    metric = metrics.get(str(best.get("metric"))) if isinstance(metrics, dict) else None
    if isinstance(metric, dict):
        problems += _judge_problems(best, metric, datasets)


def _judge_problems(best: dict[str, Any], metric: dict[str, Any], datasets: Any) -> list[str]:
    """Returns why a metric of ``val.metrics`` cannot select the best checkpoint."""
    place, kind = f"val.metrics.{best['metric']}", str(metric.get("type"))
    if better_of(metric) is None:
        return [f"{place}.better: is required by logger.save_best.metric; give higher or lower"]
    known = registered(METRIC_REGISTRY)
    sets = datasets.values() if isinstance(datasets, dict) else ()
    if kind in known and "img2" in options_of(known[kind]):
        return [
            f"logger.save_best.metric: {kind} needs GT, which the set {best.get('set')} does not have"
            for dataset in sets
            if isinstance(dataset, dict)
            and dataset.get("name") == best.get("set")
            and not gives_gt(dataset.get("type"))
        ]
    return []
