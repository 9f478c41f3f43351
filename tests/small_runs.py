"""Small models and runs from the options of a test, and what the check says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from kdsr import train as train_entry
from kdsr.models.kd_model import KDModel
from kdsr.models.vqgan_model import VQGANModel
from kdsr.options.check import check


def complete(options: dict[str, Any]) -> dict[str, Any]:
    """What the command line adds to an option file."""
    options = copy.deepcopy(options)
    options.update(num_gpu=0, dist=False, rank=0, world_size=1, is_train=True)
    return options


def run(options: dict[str, Any], *flags: str) -> int:
    """The exit code of a training of these options, in this process and in the working directory."""
    Path("run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return train_entry.main(["-opt", "run.yml", *flags])


def after_steps(do: Callable[[Any, int], None], patch: Callable[..., None] = setattr) -> None:
    """Calls ``do`` with the model and the iteration after each training step of all models from now on."""
    for kind in (KDModel, VQGANModel):
        original = kind.optimize_parameters

        def optimize_parameters(self: Any, current_iter: int, original: Any = original) -> None:
            original(self, current_iter)
            do(self, current_iter)

        patch(kind, "optimize_parameters", optimize_parameters)


def seen(net: Any, x: torch.Tensor, *names: str) -> list[torch.Tensor]:
    """The outputs of modules in a pass of their own."""
    kept: dict[str, torch.Tensor] = {}
    modules = dict(net.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda _, __, out, name=name: kept.__setitem__(name, out.clone()))
        for name in names
    ]
    net(x)
    for handle in handles:
        handle.remove()
    return [kept[name] for name in names]


def problems_after(options: dict[str, Any], changes: dict[str, Any], is_train: bool = True) -> list[str]:
    """The check's findings after ``{"train.optim_g.lrr": 1}`` and the like; ``...`` takes a key out."""
    changed = copy.deepcopy(options)
    for place, value in changes.items():
        *above, last = place.split(".")
        section = changed
        for key in above:
            section = section[int(key)] if isinstance(section, list) else section.setdefault(key, {})
        if value is ...:
            del section[last]
        else:
            section[int(last) if isinstance(section, list) else last] = value
    return check(changed, is_train)
