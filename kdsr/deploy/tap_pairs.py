"""Proposes the features that a student is compared in with its teacher: those at equal relative depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from kdsr.runtime.errors import OptionError

_SHARES = (1 / 3, 2 / 3, 1.0)
# losses of a method that compare features -> the option that lists them
_LISTED_BY = {"nc_opt": "encoder_taps", "et_opt": "decoder_taps", "bm_opt": "blocks"} | dict.fromkeys(
    ("fitnet_opt", "at_opt", "fakd_opt", "rkd_opt", "facd_opt", "fm_opt"), "taps"
)
_LEVELS = {
    "encoder_taps": (r"encoders\.\d+", r"encoder_level\d+"),
    "decoder_taps": (r"decoders\.\d+", r"decoder_level\d+"),
}


def tap_options(train: Mapping[str, Any], student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """The options of ``train`` that list features, for the losses of a method; empty where it compares none.

    Raises:
        OptionError: A network has no such features.
    """
    found: dict[str, Any] = {}
    for loss, option in _LISTED_BY.items():
        if train.get(loss) and option not in found and option not in train:
            found[option] = pairs(option, student, teacher, loss)
    return found


def pairs(option: str, student: nn.Module, teacher: nn.Module, loss: str) -> list[dict[str, str]]:
    """Pairs of module names: ``[{student: body.3, teacher: body.9}, ...]``."""
    if option == "taps":
        lists = [_at_shares(blocks(net)) for net in (student, teacher)]
    elif option == "blocks":
        if type(student) is not type(teacher):
            raise OptionError(
                f"--method: {loss} lets the teacher's blocks stand in for the student's, which must be of the same "
                f"architecture; they are {type(student).__name__} and {type(teacher).__name__}"
            )
        lists = [_at_shares(blocks(net)) for net in (student, teacher)]
    else:
        lists = [_levels(net, _LEVELS[option]) for net in (student, teacher)]
    names = list(dict.fromkeys(zip(*lists, strict=False)))
    if not names:
        what = "repeated blocks" if option in ("taps", "blocks") else "levels of an encoder and a decoder"
        lacking = [
            type(net).__name__ for net, found in zip((student, teacher), lists, strict=True) if not found
        ]
        raise OptionError(
            f"--method: {loss} compares {what}, {' and '.join(dict.fromkeys(lacking))} has none; take another"
        )
    return [{"student": first, "teacher": second} for first, second in names]


def blocks(net: nn.Module) -> list[str]:
    """Names of the modules that follow one another in the body: numbered siblings with most parameters.

    They are ``body.0`` to ``body.15`` of an EDSR, ``layers.0`` to ``layers.5`` of a SwinIR, ``block_1`` to ``block_6``
    of an RLFN. They are of one class; convolutions and plain lists of layers also of one size.
    """
    names: dict[tuple[Any, ...], list[str]] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    for prefix, module in net.named_modules():
        for name, child in module.named_children():
            size = sum(parameter.numel() for parameter in child.parameters())
            plain = isinstance(child, nn.Sequential | nn.ModuleList) or not list(child.children())
            key = (prefix, re.sub(r"\d+", "0", name), type(child), size if plain else 0)
            names.setdefault(key, []).append(f"{prefix}.{name}" if prefix else name)
            sizes[key] = sizes.get(key, 0) + size
    several = [key for key, group in names.items() if len(group) > 1 and sizes[key]]
    return names[max(several, key=lambda key: sizes[key])] if several else []


def _at_shares(names: Sequence[str]) -> list[str]:
    return [names[max(round(len(names) * share), 1) - 1] for share in _SHARES] if names else []


def _levels(net: nn.Module, patterns: Iterable[str]) -> list[str]:
    return [
        name
        for name, module in net.named_modules()
        if any(re.fullmatch(pattern, name) for pattern in patterns) and len(list(module.children()))
    ]
