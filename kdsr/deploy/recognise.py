"""Recognises the architecture and the options of a network by its tensors' names and shapes.

Known are EDSR, RCAN, RRDBNet, SRVGGNetCompact, MSRResNet and SwinIR of BasicSR, and NAFNet, Restormer, RLFN and PReNet
of this package. A recognised network is built and compared with the tensors, so that it loads them strictly.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor

from kdsr.deploy.architectures import READERS, SMALL, Options, Shapes
from kdsr.options.signatures import registered


@dataclass(frozen=True)
class Recognised:
    """A recognised network.

    Attributes:
        options: ``type`` and arguments; where tensors do not tell a value, the usual one.
        candidates: All sets of options that fit the tensors, ``options`` first. With more than one only images tell
            which is right.
        unknown: Names of the options in which the candidates differ.
    """

    options: Options
    candidates: tuple[Options, ...]
    unknown: tuple[str, ...] = ()


def recognise(weights: Mapping[str, Tensor]) -> Options | None:
    """The options (``type`` and arguments) of the network of a state dict; None where it is not known."""
    found = recognised(weights)
    return found.options if found else None


def recognised(weights: Mapping[str, Tensor]) -> Recognised | None:
    """As ``recognise``, with all candidates for options that tensors do not show."""
    for kind, read in READERS.items():
        try:
            found, unknown = read(Shapes(weights))
        except (LookupError, ValueError, ArithmeticError, StopIteration):  # tensors of another network
            continue
        candidates = tuple(
            {"type": kind, **found, **dict(zip(unknown, values, strict=True))}
            for values in itertools.product(*unknown.values())
        )
        if _fits(candidates[0], weights):
            return Recognised(candidates[0], candidates, tuple(unknown))
    return None


def closest(weights: Mapping[str, Tensor]) -> str | None:
    """The known type that has most names of tensors in common with a state dict; None if hardly any."""

    def without_numbers(names: Iterable[str]) -> set[str]:
        return {re.sub(r"\d+", "0", name) for name in names}

    given = without_numbers(weights)
    shares = {}
    for kind, arguments in SMALL.items():
        own = without_numbers(_tensors({"type": kind, **arguments}))
        shares[kind] = len(given & own) / len(given | own)
    best = max(shares, key=lambda kind: shares[kind])
    return best if shares[best] > 0.2 else None


def _fits(options: Options, weights: Mapping[str, Tensor]) -> bool:
    """Whether a network of these options has exactly these tensors."""
    try:
        return _tensors(options) == {name: value.shape for name, value in weights.items()}
    except Exception:  # numbers that do not go together
        return False


def _tensors(options: Options) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of a network."""
    with torch.random.fork_rng(devices=[]):
        net = registered(ARCH_REGISTRY)[options["type"]](
            **{key: value for key, value in options.items() if key != "type"}
        )
    return {name: value.shape for name, value in net.state_dict().items()}
