"""Checks sizes: the scale, the training patches, and the multiples that networks need."""

from __future__ import annotations

from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY

from kdsr.data.batch_plan import patch_sizes
from kdsr.options.signatures import options_of, registered
from kdsr.runtime.declarations import is_kind
from kdsr.runtime.memory import limit_network_size

_SCALE_PARAMETERS = ("upscale", "scale")


def check_geometry(opt: dict[str, Any], is_train: bool, problems: list[str]) -> None:
    """Checks that data, student and teacher agree in scale, and that a training patch fits networks and model.

    ``opt`` is the result of ``each_network``.
    """
    scale = opt.get("scale", 1)
    if not is_kind(scale, int) or scale < 1:
        return
    networks = [key for key in opt if key in ("network_g", "network_t") or key.startswith("network_t.")]
    for key in networks:
        _check_scale(opt, key, scale, problems)
    train = (opt.get("datasets") or {}).get("train") if isinstance(opt.get("datasets"), dict) else None
    if is_train and isinstance(train, dict):
        multiples = {key: _multiple_of(opt.get(key)) for key in networks}
        model: Any = registered(MODEL_REGISTRY).get(str(opt.get("model_type")))
        required = model.patch_multiples(opt) if hasattr(model, "patch_multiples") else {}
        for place, size in patch_sizes(train):
            _check_patch(opt, size, int(scale), place, multiples, problems)
            problems += [
                f"{place}: {size} is not a multiple of {multiple}, which {option} needs"
                for option, multiple in required.items()
                if size % multiple
            ]


def _check_patch(
    opt: dict[str, Any], size: int, scale: int, place: str, multiples: dict[str, int], problems: list[str]
) -> None:
    if size % scale:
        if "progressive" in place:  # the check of the data reports the set's own gt_size
            problems.append(f"{place}: {size} is not a multiple of the scale {scale}")
        return
    patch = size // scale
    prefix = f"{place}: {size} gives LQ patches of {patch}"
    for key, multiple in multiples.items():
        _check_window(opt.get(key), key, patch, prefix, problems)
        if patch % multiple:
            problems.append(f"{prefix}, but {key} ({opt[key]['type']}) takes multiples of {multiple}")


def _effective(options: dict[str, Any], name: str) -> Any:
    """Returns a network's parameter: the given value or the constructor's default; None if it does not exist."""
    if name in options:
        return options[name]
    network = registered(ARCH_REGISTRY).get(str(options.get("type")))
    declared = options_of(network).get(name) if network is not None else None
    return declared.default if declared else None


def _check_scale(opt: dict[str, Any], key: str, scale: float, problems: list[str]) -> None:
    options = opt.get(key)
    if not isinstance(options, dict):
        return
    facts = _facts(options)
    if facts is not None and facts.scale != scale:
        given = f"scale is {scale:g}" if "scale" in opt else "scale is not given"
        place, what = ("path", options["path"]) if "path" in options else ("parameters", "this")
        problems.append(
            f"{key}.{place}: {what} is a network of scale {facts.scale} ({facts.architecture}), but {given}"
        )
    if options.get("type") == "SwinIR" and not options.get("upsampler"):
        return  # without an upsampler SwinIR ignores upscale
    for name in _SCALE_PARAMETERS:
        value = _effective(options, name)
        if isinstance(value, int) and value != scale:
            how = "" if name in options else " by default"
            given = f"scale is {scale:g}" if "scale" in opt else "scale is not given"
            problems.append(f"{key}.{name}: is {value}{how}, but {given}")


def _facts(options: dict[str, Any]) -> Any:
    """Returns what spandrel knows of a network; None for other networks, or if it cannot be built."""
    network: Any = registered(ARCH_REGISTRY).get(str(options.get("type")))
    needed = {"path", "architecture"}
    if not hasattr(network, "facts") or not needed & options.keys() or network.option_problems(options):
        return None  # reported elsewhere
    return network.facts(options)


def _check_window(options: Any, key: str, patch: int, prefix: str, problems: list[str]) -> None:
    """Checks the window of BasicSR's SwinIR, which does not pad."""
    if not isinstance(options, dict) or options.get("type") != "SwinIR":
        return
    window, image = _effective(options, "window_size"), _effective(options, "img_size")
    if isinstance(window, int) and isinstance(image, int):
        window = min(window, image)
        if window > 0 and patch % window:
            problems.append(f"{prefix}, but {key} takes multiples of its window_size {window}")


def _multiple_of(options: Any) -> int:
    """Returns ``window_size`` or ``multiple_of`` of a network, from its class or an instance on the meta device.

    Returns 1 for BasicSR's networks, which do not define these, and for a network that cannot be built.
    """
    network = registered(ARCH_REGISTRY).get(str(options.get("type"))) if isinstance(options, dict) else None
    if network is None or network.__module__.startswith("basicsr."):
        return 1
    if hasattr(network, "facts"):
        facts = _facts(options)
        return facts.multiple_of if facts is not None else 1
    built = network
    if (
        not isinstance(getattr(network, "multiple_of", None), int)
        and (built := _without_memory(options)) is None
    ):
        return 1
    declared = getattr(built, "window_size", None) or getattr(built, "multiple_of", 1)
    return declared if isinstance(declared, int) and declared > 0 else 1


def has_parameters(options: Any) -> bool:
    """Whether a network has parameters; True if it cannot be built."""
    net = _without_memory(options) if isinstance(options, dict) else None
    return net is None or any(True for _ in net.parameters())


def _without_memory(options: dict[str, Any]) -> Any:
    """Builds a network on the meta device; None if that fails."""
    network: Any = registered(ARCH_REGISTRY).get(str(options.get("type")))
    arguments = {name: value for name, value in options.items() if name != "type"}
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), limit_network_size("network"):
            return network(**arguments)
    except Exception:  # any error of an architecture
        return None
