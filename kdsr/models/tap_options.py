"""Reads the options that list features: ``taps: [{student: body.3, teacher: body.7}, ...]``."""

from __future__ import annotations

from typing import Any

from kdsr.models.adapters import TapPair


def tap_problems(value: Any, option: str, what: str = "features") -> list[str]:
    """What is wrong with such an option, which lists ``what``; empty when ``tap_pairs`` can read it."""
    if isinstance(value, dict):
        lists = [value.get(role) for role in TapPair._fields]
        if set(value) != set(TapPair._fields) or not all(isinstance(names, list) for names in lists):
            return [f"{option}: expected two lists of module names, student and teacher, got {value}"]
        counts = [len(names) for names in lists if names is not None]
        if counts[0] != counts[1]:
            return [
                f"{option}: {counts[0]} modules of the student and {counts[1]} of the teacher; give pairs"
            ]
        return (
            []
            if all(_is_name(name) for names in lists for name in names or ())
            else [_wrong(option, value, what)]
        )
    if not isinstance(value, list) or not value:
        return [_wrong(option, value, what)]
    return [
        _wrong(f"{option}.{index}", pair, what)
        for index, pair in enumerate(value)
        if not (
            isinstance(pair, dict) and set(pair) == set(TapPair._fields) and all(map(_is_name, pair.values()))
        )
    ]


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name)


def _wrong(option: str, value: Any, what: str) -> str:
    return (
        f"{option}: {value!r} names no {what}; write pairs of module names, such as "
        "[{student: body.3, teacher: body.7}]"
    )


def tap_pairs(value: Any) -> list[TapPair]:
    """The pairs, from a list of ``{student, teacher}`` or from ``{student: [...], teacher: [...]}``."""
    if isinstance(value, dict):
        return [TapPair(*names) for names in zip(value["student"], value["teacher"], strict=True)]
    return [TapPair(pair["student"], pair["teacher"]) for pair in value]
