"""Validates a training state against the model before anything of it is loaded.

A readable file may still hold values that no run has written. torch loads much of it unchecked (an optimizer any
tensors, a scheduler any attributes) and fails at the first step, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kdsr.runtime.errors import CheckpointError, KdsrError

_FACTORS = ("row_var", "col_var")  # Adafactor's, with shapes of their own
_SCALARS = ("step", "mu_product", "eta", "mu")  # state of optimizers that is one number per parameter
_KERNELS = ("params", "fused", "foreach")  # of a group: not loaded, or specific to the machine


@contextmanager
def loading_state(file: str) -> Iterator[None]:
    """Turns any error of loading a state into a CheckpointError.

    Raises:
        CheckpointError: Naming the file.
    """
    try:
        yield
    except KdsrError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{file}: no run can go on from it ({type(error).__name__}: {reason}); it was damaged, or is no state"
        ) from error


def networks_problem(saved: Any, own: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Which saved weight is no tensor of the right type; names and shapes are checked where they are loaded."""
    if not isinstance(saved, dict):
        return "networks is no section"
    for network, weights in own.items():
        found = saved.get(network)
        if found is not None and not isinstance(found, dict):
            return f"{network} is no dict of tensors"
        for name, value in weights.items():
            if isinstance(value, Tensor) and found is not None and name in found:
                problem = _tensor_problem(found[name], value, shape=False)
                if problem:
                    return f"{network}.{name} {problem}"
    return None


def optimizer_problem(saved: Any, optimizer: Optimizer) -> str | None:
    """Why ``optimizer`` cannot load a saved state, apart from other settings; None where it can."""
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return "is no optimizer's"
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(optimizer.param_groups):
        return "has other groups of parameters"
    parameters: dict[Any, Tensor] = {}
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        numbers = group.get("params") if isinstance(group, dict) else None
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            return "names no parameters"
        if len(numbers) != len(own["params"]):
            return f"is for {len(numbers)} parameters, the run has {len(own['params'])}"
        parameters |= dict(zip(numbers, own["params"], strict=True))
        for key in (own.keys() & group.keys()) - {*_KERNELS}:
            if not same_kind(group[key], own[key]):
                return f"has {key}: {str(group[key])[:60]}"
    names: dict[bool, set[Any]] = {}
    for number, entry in saved["state"].items():
        if number not in parameters:
            return f"speaks of a parameter {str(number)[:20]} that there is not"
        # Adafactor's entries differ between matrices and vectors
        if not isinstance(entry, dict) or entry.keys() != names.setdefault(
            parameters[number].ndim > 1, set(entry)
        ):
            return "does not say the same of all parameters"
        for name, value in entry.items():
            problem = _moment_problem(name, value, parameters[number])
            if problem:
                return f"{name} of parameter {number} {problem}"
    return None


def _moment_problem(name: Any, value: Any, parameter: Tensor) -> str | None:
    if name in _SCALARS:
        one = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
        fine = one or (isinstance(value, int | float) and not isinstance(value, bool))
        return None if fine else "is no number"
    if value is None:  # SGD's, before its first step
        return None
    return _tensor_problem(value, parameter, shape=name not in _FACTORS)


def _tensor_problem(value: Any, like: Tensor, shape: bool = True) -> str | None:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return "is no tensor as it was saved"
    if value.dtype != like.dtype:
        return f"is {value.dtype}, not {like.dtype}"
    if shape and value.shape != like.shape:
        return f"has the shape {tuple(value.shape)}, not {tuple(like.shape)}"
    return None


def scheduler_problem(saved: Any, scheduler: Any) -> str | None:
    """Why a scheduler cannot load a saved state; its own method would accept any attributes."""
    if not isinstance(saved, dict) or "last_epoch" not in saved:
        return "is no state of this scheduler"
    own = scheduler.state_dict()
    for key, value in saved.items():
        if (
            not same_kind(value, own[key])
            if key in own
            else not isinstance(key, str) or hasattr(scheduler, key)
        ):
            return f"has {str(key)[:60]}: {str(value)[:60]}"
    return None


def best_problem(saved: Any) -> str | None:
    """What is wrong with the best values, ``{set: {metric: {better, val, iter}}}``."""
    sets = saved.values() if isinstance(saved, dict) else [None]
    metrics = [
        metric for values in sets for metric in (values.values() if isinstance(values, dict) else [None])
    ]
    kinds = {"better": "", "val": 0.0, "iter": 0}
    fine = all(isinstance(metric, dict) and same_kind(metric, kinds) for metric in metrics)
    return None if fine else "best_metric_results are no values of metrics"


def generator_problem(saved: Any, own: Sequence[str]) -> str | None:
    """Why the generators cannot be set to their saved states; changes nothing."""
    if not isinstance(saved, dict):
        return "is no section"
    for name in own:
        try:
            if name != "cuda":  # a CUDA generator needs the device
                torch.Generator().set_state(saved[name].cpu())
            elif name in saved and saved[name].dtype != torch.uint8:
                return f"{name} is no state of a generator"
        except (AttributeError, KeyError, RuntimeError, TypeError):
            return f"{name} is no state of a generator"
    return None


def same_kind(value: Any, own: Any) -> bool:
    """Whether a saved value has the type of the run's own value: a number, text, or lists and dicts of such."""
    if isinstance(own, bool) or isinstance(value, bool):
        return isinstance(value, bool) and (isinstance(own, bool) or own is None)
    if isinstance(own, int | float):
        return isinstance(value, int | float)
    if isinstance(own, Tensor):
        return isinstance(value, Tensor) and value.shape == own.shape and value.dtype == own.dtype
    if isinstance(own, list | tuple):
        same = isinstance(value, list | tuple) and len(value) == len(own)
        return same and all(same_kind(*pair) for pair in zip(value, own, strict=True))
    if isinstance(own, dict):
        same = isinstance(value, dict) and value.keys() == own.keys()
        return same and all(same_kind(value[key], own[key]) for key in own)
    return value is None if own is None else type(value) is type(own)


def check_state(
    state: Mapping[str, Any],
    file: str,
    networks: Mapping[str, Mapping[str, Any]],
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    generators: Sequence[str],
) -> None:
    """Refuses a state of another model, before anything of it is loaded.

    Args:
        state: As read.
        file: Where it was read, for the message.
        networks: The model's own state dicts, by name.
        optimizers: Its optimizers.
        schedulers: Their schedulers, as built.
        generators: Names of its generators.

    Raises:
        CheckpointError: With everything that does not fit.
    """
    problems = [networks_problem(state.get("networks"), networks)]
    for key, own, look in (
        ("optimizers", optimizers, optimizer_problem),
        ("schedulers", schedulers, scheduler_problem),
    ):
        saved = state.get(key)
        if isinstance(saved, list) and len(saved) == len(own):  # the number is checked where they are loaded
            found = [look(one, other) for one, other in zip(saved, own, strict=True)]
            problems += [f"{key}.{n} {problem}" for n, problem in enumerate(found) if problem]
    problems.append(best_problem(state.get("best_metric_results", {})))
    ranks = state.get("generators")
    if not isinstance(ranks, list):
        problems.append("generators is no list")
    else:
        found = [generator_problem(rank, generators) for rank in ranks]
        problems += [f"generators.{rank} {problem}" for rank, problem in enumerate(found) if problem]
    if any(problems):
        raise CheckpointError(
            [f"{file}: no run can go on from it: {problem}" for problem in problems if problem]
        )
