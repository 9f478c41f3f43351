"""Reads options that list features, ``taps: [{student: body.3, teacher: body.7}, ...]``, and suggests pieces with them.

The pieces in ``options/_base_/taps`` and ``blocks`` have the name of their network, ``EDSR.yml``. Those for one method
or size, ``EDSR_FACD.yml``, are not suggested.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from basicsr.utils.registry import ARCH_REGISTRY

from kdsr.distill.adapters import TapPair
from kdsr.distill.taps import share_problem
from kdsr.runtime.atomic_files import display_path

# in a checkout; an installed package has no pieces
PIECES = Path(__file__).resolve().parents[2] / "options" / "_base_"


def tap_problems(value: Any, option: str, what: str = "features") -> list[str]:
    """Returns the problems of an option that lists ``what``; empty if ``tap_pairs`` can read it."""
    if isinstance(value, dict):
        lists = [value.get(role) for role in TapPair._fields]
        if set(value) != set(TapPair._fields) or not all(isinstance(names, list) for names in lists):
            return [f"{option}: expected two lists of module names, student and teacher, got {value}"]
        counts = [len(names) for names in lists if names is not None]
        if counts[0] != counts[1]:
            return [
                f"{option}: {counts[0]} modules of the student and {counts[1]} of the teacher; give pairs"
            ]
        named = all(_is_name(name) for names in lists for name in names or ())
        return _share_problems(value, option) if named else [_wrong(option, value, what)]
    if not isinstance(value, list) or not value:
        return [_wrong(option, value, what)]
    return [
        _wrong(f"{option}.{index}", pair, what)
        for index, pair in enumerate(value)
        if not (
            isinstance(pair, dict) and set(pair) == set(TapPair._fields) and all(map(_is_name, pair.values()))
        )
    ] or _share_problems(value, option)


def _share_problems(value: Any, option: str) -> list[str]:
    names = [name for pair in tap_pairs(value) for name in pair]
    return [f"{option}: {name}: {problem}" for name in names if (problem := share_problem(name)) is not None]


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name)


def _wrong(option: str, value: Any, what: str) -> str:
    return (
        f"{option}: {value!r} is not a list of {what}; give pairs of module names, such as "
        "[{student: body.3, teacher: body.7}]"
    )


def missing_taps(opt: dict[str, Any], key: str, needed_by: Sequence[str], teacher: str = "t") -> str:
    """Returns the message that ``train.<key>`` is missing, with a piece that has it for these networks, or an example.

    Args:
        opt: The options.
        key: ``taps``, ``encoder_taps``, ``decoder_taps`` or ``blocks``.
        needed_by: The keys of ``train`` that require it.
        teacher: The key of the teacher network.
    """
    needing = " and ".join(f"train.{name}" for name in needed_by)
    problem = f"train.{key}: missing, {needing} need{'s' if len(needed_by) == 1 else ''} it"
    folder = PIECES / ("blocks" if key == "blocks" else "taps")
    pairs = "list pairs of module names, such as [{student: body.3, teacher: body.7}]"
    if not folder.is_dir():
        return f"{problem}; {pairs}; options/_base_/{folder.name} in kdsr's repository has examples"
    networks = [opt.get("network_g"), opt.get(f"network_{teacher}") or opt.get("network_t")]
    types = [str(one.get("architecture") or one.get("type")) for one in networks if isinstance(one, dict)]
    fitting = [file for file in sorted(folder.glob("*.yml")) if _gives(file, key) and _is_for(file, types)]
    if fitting:
        return f"{problem}; add {' or '.join(map(display_path, fitting))} to _base_"
    both = " and ".join(dict.fromkeys(types)) or "these networks"
    return f"{problem}; {display_path(folder)} has none for {both}: {pairs} (docs/new_backbone.md)"


def _gives(piece: Path, key: str) -> bool:
    options = yaml.safe_load(piece.read_text(encoding="utf-8"))
    return key in (options.get("train") or {})


def _is_for(piece: Path, types: Sequence[str]) -> bool:
    """Whether a piece has the name of all these types of networks, or of base classes of them."""
    known = dict(iter(ARCH_REGISTRY))
    bases = [[cls.__name__ for cls in known[one].__mro__] if one in known else [one] for one in types]
    return bool(types) and all(piece.stem in names for names in bases)


def tap_pairs(value: Any) -> list[TapPair]:
    """Returns the pairs of a list of ``{student, teacher}`` or of ``{student: [...], teacher: [...]}``."""
    if isinstance(value, dict):
        return [TapPair(*names) for names in zip(value["student"], value["teacher"], strict=True)]
    return [TapPair(pair["student"], pair["teacher"]) for pair in value]
