"""Checks options before anything is built. Reports all problems at once, with the nearest valid names.

The options of networks, losses and metrics are the arguments of their constructors and functions. All others are
declared by subclasses of ``Options`` (``kdsr.runtime.declarations``). The keys of a model or data set without
declarations are not checked.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from os import path as osp
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from kdsr.distill.moving_average import lag_warning
from kdsr.distill.weight_files import each_network, list_problems, weight_files
from kdsr.distill.weight_schedule import is_schedule, schedule_problems
from kdsr.models.image_metrics import better_of
from kdsr.models.sections import LoopOptions
from kdsr.models.tiling import tile_problems
from kdsr.options.check_data import check_datasets
from kdsr.options.check_geometry import check_geometry, has_parameters
from kdsr.options.check_gt import check_ground_truth, gives_gt
from kdsr.options.check_logger import check_logger
from kdsr.options.check_roles import normalisation_warnings
from kdsr.options.model_keys import ModelKeys, read_by_others, report_idle_keys, resumed_problems
from kdsr.options.signatures import check_call, find_type, folder_name_problems, options_of, registered
from kdsr.options.stock import LEARNING_RATE, SCHEDULERS, STOCK_METRICS, STOCK_SCHEDULERS, MetricOptions
from kdsr.runtime.declarations import Option, Options, check_kind, check_section, describe
from kdsr.runtime.distributed import DistOptions
from kdsr.runtime.precision import PrecisionOptions, compiler_problems, slow_problems
from kdsr.runtime.stopping import signal_problems
from kdsr.runtime.suggestions import nearest


def check(
    opt: dict[str, Any], is_train: bool, warnings: list[str] | None = None, random_weights: bool = False
) -> list[str]:
    """Returns all problems of an option tree; empty if it can be run.

    Args:
        opt: The options as in the option file, with pieces, overrides and references applied.
        is_train: Whether the options are checked for training or for testing.
        warnings: Receives problems that do not stop the run.
        random_weights: Whether a network without pretrained weights may be tested.
    """
    problems: list[str] = []
    warnings = [] if warnings is None else warnings
    model = _find_model(opt, problems)
    keys = ModelKeys(model)
    _check_top(opt, keys, is_train, problems)
    problems += list_problems(opt)
    _check_networks(each_network(opt), is_train, problems)
    if isinstance(opt.get("train"), dict):
        _check_train(opt["train"], keys, is_train, problems)
    if isinstance(opt.get("val"), dict):
        _check_val(opt["val"], keys, is_train, problems, warnings)
    _check_references(opt, keys, problems)
    _check_paths(opt, keys, is_train, problems)
    check_logger(opt, keys, problems)
    if isinstance(opt.get("dist_params"), dict):
        check_section(opt["dist_params"], DistOptions.declared(), "dist_params", problems)
    if keys.ours and isinstance(opt.get("precision"), dict):
        check_section(opt["precision"], PrecisionOptions.declared(), "precision", problems)
        if is_train:
            on_cpu = opt.get("num_gpu") == 0 or not torch.cuda.is_available()
            problems += slow_problems(opt["precision"], on_cpu) + compiler_problems(opt["precision"], on_cpu)
    if "stop_signals" in opt and check_kind(opt["stop_signals"], list, "stop_signals", problems):
        problems += [f"stop_signals{problem}" for problem in signal_problems(opt["stop_signals"])]
    if is_train:
        report_idle_keys(opt, model, problems, warnings)
    check_datasets(opt, is_train, problems, warnings)
    if not problems:
        warnings += normalisation_warnings(opt, keys.ours)
    check_geometry(each_network(opt), is_train, problems)
    train = opt.get("train")
    if is_train and isinstance(train, dict) and "ema_decay" in keys.train:
        lag = lag_warning(train, has_warmup="ema_warmup" in keys.train)
        warnings += [lag] if lag else []
    if not is_train and "g" not in weight_files(opt) and has_parameters(opt.get("network_g")):
        missing = "path.pretrain_network_g: missing; a network with random weights "
        if random_weights:
            warnings.append(f"{missing}is tested")
        else:
            problems.append(f"{missing}would be tested; name its file, or give --random-weights")
    if is_train and model is not None:  # a test builds the student alone
        found = len(problems)
        try:
            check_ground_truth(opt, model, problems)
            problems += model.check_options(opt) if hasattr(model, "check_options") else []
        except (AttributeError, KeyError, TypeError, ValueError):
            if not found:  # else the error follows from a problem that is already reported
                raise
    return problems


def _find_model(opt: dict[str, Any], problems: list[str]) -> type | None:
    name = opt.get("model_type")
    if name is None:
        problems.append("model_type: is required")
        return None
    known = registered(MODEL_REGISTRY)
    if isinstance(name, str) and name in known:
        return known[name]
    problems.append(f"model_type: {describe(name)} is not known; {nearest(str(name), known)}")
    meant = difflib.get_close_matches(
        str(name), known, n=1
    )  # the other checks use the model with the nearest name
    return known[meant[0]] if meant else None


def _check_top(opt: dict[str, Any], keys: ModelKeys, is_train: bool, problems: list[str]) -> None:
    unjudged = ["model_type", *([] if keys.strict else [key for key in opt if key not in keys.top])]
    unjudged += read_by_others("top", opt, keys, problems)
    if not keys.strict and not opt.get("network_g"):
        problems.append("network_g: is required")
    phase = "train" if is_train else "test"
    check_section(opt, keys.top, "", problems, phase=phase, skip=[*unjudged, "num_gpu", "stop_signals"])
    if isinstance(opt.get("name"), str):
        problems += folder_name_problems(opt["name"])
    _check_older_keys(opt, problems)
    num_gpu = opt.get("num_gpu", "auto")
    if num_gpu != "auto" and (isinstance(num_gpu, bool) or not isinstance(num_gpu, int) or num_gpu < 0):
        problems.append(f"num_gpu: {num_gpu!r} is neither auto nor a number of GPUs (0 means the CPU)")


def _check_older_keys(opt: dict[str, Any], problems: list[str]) -> None:
    """Checks options of ``val`` at the top level, where BasicSR's older test files have them and nothing reads them."""
    val = opt["val"] if isinstance(opt.get("val"), dict) else {}
    metrics = val["metrics"] if isinstance(val.get("metrics"), dict) else {}
    of_metrics = [metric.get("crop_border") for metric in metrics.values() if isinstance(metric, dict)]
    for key, there, place in (
        ("save_img", [val.get("save_img", False)], "val.save_img"),
        ("suffix", [val.get("suffix")], "val.suffix"),
        ("crop_border", of_metrics, "val.metrics.NAME.crop_border"),
    ):
        value = opt.get(key)
        if value is not None and there and value not in there:
            problems.append(f"{key}: has no effect here; set {place}, or remove it")


def _check_networks(opt: dict[str, Any], is_train: bool, problems: list[str]) -> None:
    known = registered(ARCH_REGISTRY)
    for key, options in opt.items():
        if key.startswith("network_") and isinstance(options, dict):
            network = find_type(options, known, key, problems)
            if network is not None:
                check_call(network, options, key, problems)
                # a test builds only network_g; files of the other networks may be missing
                built = is_train or key == "network_g"
                if built and hasattr(network, "option_problems"):  # checks beyond the signature
                    problems += [f"{key}.{problem}" for problem in network.option_problems(options)]


def _check_train(train: dict[str, Any], keys: ModelKeys, is_train: bool, problems: list[str]) -> None:
    declared = keys.train if keys.strict else LoopOptions.declared()
    unjudged = [] if keys.strict else [*(key for key in train if key not in declared), "total_iter"]
    unjudged += read_by_others("train", train, keys, problems)
    check_section(train, declared, "train", problems, phase="train" if is_train else "", skip=unjudged)
    losses = registered(LOSS_REGISTRY)
    for key, options in train.items():
        place = f"train.{key}"
        if not isinstance(options, dict) or not (key in keys.train or not keys.strict):
            continue
        if key.startswith("optim_"):
            _check_optimizer(options, place, problems)
        elif key == "scheduler":
            known = SCHEDULERS if keys.ours else STOCK_SCHEDULERS
            _check_scheduler(options, known, train.get("total_iter"), problems)
        elif key.endswith("_opt") and (keys.strict or str(options.get("type")) in losses):
            loss = find_type(options, losses, place, problems)
            wanted = keys.train[key].losses if key in keys.train else ()
            if loss is not None and wanted and not issubclass(loss, wanted):
                use = " or ".join(each.__name__ for each in wanted)
                problems.append(f"{place}.type: {options['type']} is not a loss of this term; use {use}")
                continue
            if keys.ours and is_schedule(options.get("loss_weight")):
                problems += schedule_problems(options["loss_weight"], f"{place}.loss_weight")
                options = {**options, "loss_weight": 1.0}
            if loss is not None:
                check_call(loss, options, place, problems)


def optimizers() -> dict[str, Any]:
    """Returns the optimizers of torch by name."""
    base = torch.optim.Optimizer
    return {
        name: cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base
    }


def _check_optimizer(options: dict[str, Any], place: str, problems: list[str]) -> None:
    optimizer = find_type(options, optimizers(), place, problems, own=False)
    if optimizer is not None:
        declared = options_of(optimizer, given=["params"]) | LEARNING_RATE
        check_call(optimizer, options, place, problems, declared=declared)


def _check_scheduler(
    options: dict[str, Any], known: Mapping[str, type[Options]], total_iter: Any, problems: list[str]
) -> None:
    place = "train.scheduler"
    scheduler = find_type(options, known, place, problems, own=False)
    if scheduler is None:
        return
    before = len(problems)
    arguments = {key: value for key, value in options.items() if key != "type"}
    check_section(arguments, scheduler.declared(), place, problems, callee=options["type"])
    if len(problems) > before:
        return
    parts = "periods" if "periods" in scheduler.declared() else "restarts"
    count = len(options.get(parts, (1,)))
    for key in ("restart_weights", "eta_mins"):
        if key in scheduler.declared() and (found := len(options.get(key, (1,)))) != count:
            problems.append(f"{place}.{key}: {found} values for {count} {parts}")
    # BasicSR's scheduler fails after its last period
    whole = sum(options.get("periods", ()))
    if parts == "periods" and isinstance(total_iter, int | float) and whole < total_iter - 1:
        problems.append(f"{place}.periods: sum to {whole} iterations, train.total_iter is {total_iter}")


def _check_val(
    val: dict[str, Any], keys: ModelKeys, is_train: bool, problems: list[str], warnings: list[str]
) -> None:
    unjudged = ["tile", "tile_overlap"] if keys.ours else []
    unjudged += [] if keys.strict else [key for key in val if key not in keys.val]
    unjudged += read_by_others("val", val, keys, problems)
    check_section(val, keys.val, "val", problems, phase="train" if is_train else "", skip=unjudged)
    problems += tile_problems(val) if keys.ours else []
    sizes = [val.get("multiple_of"), val.get("window_size")]
    if keys.ours and None not in sizes and sizes[0] != sizes[1]:
        problems.append(
            f"val.window_size: {sizes[1]} is another name of val.multiple_of, which is {sizes[0]}"
        )
    metrics = registered(METRIC_REGISTRY)
    if not isinstance(val.get("metrics"), Mapping):
        return
    for name, options in val["metrics"].items():
        place = f"val.metrics.{name}"
        if not check_kind(options, dict, place, problems):
            continue
        metric = find_type(options, metrics, place, problems)
        if metric is not None:
            check_call(metric, options, place, problems, declared=options_of_metric(options["type"], metric))
        if options.get("better") in (None, *MetricOptions.declared()["better"].choices):
            _check_direction(options, place, problems, warnings if is_train else [])


def options_of_metric(kind: str, metric: Any) -> dict[str, Option]:
    """Returns the options of a type of metric."""
    stock = STOCK_METRICS.get(kind)
    own = options_of(metric, given=["img", "img2"]) | MetricOptions.declared()
    return own if stock is None else stock.declared()


def _check_direction(options: dict[str, Any], place: str, problems: list[str], warnings: list[str]) -> None:
    """Checks ``better``, which defines the best validation."""
    known = better_of({"type": options.get("type")})
    if "better" not in options:
        if known is None:
            warnings.append(
                f"{place}.better: not given, and {options.get('type')} does not declare it; set higher or lower "
                "(higher is assumed)"
            )
    elif known not in (None, options["better"]):
        problems.append(f"{place}.better: {known} values of {options['type']} are better; remove this option")


def _check_references(opt: dict[str, Any], keys: ModelKeys, problems: list[str]) -> None:
    """Checks metrics that need GT: BasicSR's models fail on a set without GT, kdsr's skip the metric."""
    datasets, val = opt.get("datasets"), opt.get("val")
    metrics = val.get("metrics") if isinstance(val, dict) else None
    if keys.ours or not isinstance(datasets, dict) or not isinstance(metrics, dict):
        return
    known = registered(METRIC_REGISTRY)
    types = [str(options.get("type")) for options in metrics.values() if isinstance(options, dict)]
    with_reference = [name for name in types if name in known and "img2" in options_of(known[name])]
    for key, dataset in datasets.items():
        if with_reference and isinstance(dataset, dict) and not gives_gt(dataset.get("type")):
            problems.append(
                f"datasets.{key}: has no GT, which {with_reference[0]} needs; remove val.metrics, or this set"
            )


def _check_paths(opt: dict[str, Any], keys: ModelKeys, is_train: bool, problems: list[str]) -> None:
    path = opt.get("path")
    if not isinstance(path, dict):
        return
    unjudged = [] if keys.strict else [key for key in path if key not in keys.path]
    unjudged += read_by_others("path", path, keys, problems)
    check_section(path, keys.path, "path", problems, skip=unjudged)
    problems += resumed_problems(path.get("ignore_resume_networks"), opt, keys)
    needed = ["resume_state"] if is_train else []
    opt = each_network(opt)
    path = opt["path"]
    for key in path:
        network = key.removeprefix("pretrain_")
        built = is_train or network == "network_g"  # a test builds the student only
        if network != key and opt.get(network) and built:
            needed.append(key)
    if is_train and path.get("init_from") != "teacher":
        needed.append("init_from")
    for key in needed:
        file = path.get(key)
        if isinstance(file, str) and not osp.isfile(osp.expanduser(file)):
            hint = "" if osp.isabs(osp.expanduser(file)) else " (relative to the working directory)"
            problems.append(f"path.{key}: there is no file {file}{hint}")
