"""Declares options, each once and next to the code that reads it, as fields of a class that derives from ``Options``.

::

    class ContrastOptions(Options):
        num_neg: int = option(4, "Negatives from degraded inputs.", lowest=0)

    ContrastOptions.read({"num_neg": 2}).num_neg  # 2

The annotation is the kind of the value. From the declaration come the check, the defaults, the JSON Schema and the
option reference. This module needs neither torch nor BasicSR.
"""

from __future__ import annotations

import copy
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Self

from kdsr.runtime.suggestions import nearest

NONE = type(None)
Section = dict[str, Any]  # the annotation of a section whose keys are not declared here, such as a network's


@dataclass(frozen=True)
class Option:
    """What is known of one option.

    Attributes:
        help: One sentence.
        kinds: Types of its value; empty: any.
        default: Its value where it is absent.
        shown_default: What the reference says of the default, where that is computed or there is none.
        required: ``always``, ``train`` or ``test``: when the option has to be there and not null.
        choices: The valid words, where the value is text.
        one_name: A text becomes (part of) the name of a file or folder: it is not empty, and no path.
        lowest: The smallest number, of the value itself or of the items of a list.
        highest: The largest number.
        above: Numbers must be larger than this.
        below: Numbers must be smaller than this.
        fewest: Items that a list has at least.
        item: What the items of a list are.
        section: What declares the keys of the value, a section.
        losses: Losses of which (or of whose subclasses) the value, the section of a loss, names one; empty: any.
        exact: Whether 5e3, a float, is refused where a whole number is wanted.
        shown: The kind that messages name in place of ``kinds``.
        read_with: The option without which nothing reads this one.
    """

    help: str = ""
    kinds: tuple[type, ...] = ()
    default: Any = None
    shown_default: str | None = None
    required: str | None = None
    choices: tuple[str, ...] = ()
    one_name: bool = False
    lowest: float = -math.inf
    highest: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    fewest: int = 0
    item: Option | None = None
    section: type[Options] | None = None
    losses: tuple[type, ...] = ()
    exact: bool = False
    shown: type | None = None
    read_with: str | None = None

    def of_annotation(self, annotation: Any) -> Option:
        """This option with the kinds that an annotation names; an annotation of something else allows anything."""
        kinds: list[type] = []
        changes: dict[str, Any] = {}
        union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        for part in typing.get_args(annotation) if union else (annotation,):
            origin, arguments = typing.get_origin(part), typing.get_args(part)
            if isinstance(part, type) and issubclass(part, Options):
                changes["section"], part = part, dict
            elif isinstance(origin, type) and issubclass(origin, Sequence):
                if len(set(arguments) - {...}) == 1:
                    changes["item"] = replace(self, fewest=0).of_annotation(arguments[0])
                part = list
            elif isinstance(origin, type) and issubclass(origin, Mapping):
                part = dict
            kinds += (int, float) if part is float else (part,)
        known = all(kind in _KIND_NAMES for kind in kinds)
        return replace(self, kinds=tuple(dict.fromkeys(kinds)) if known else (), **changes)

    def problem(self, value: Any) -> str | None:
        """Why a value is not valid although it is of one of the kinds, for the end of a message."""
        if isinstance(value, str) and self.choices:
            return None if value in self.choices else self._other_word(value)
        if self.one_name and isinstance(value, str) and ("/" in value or value in ("", ".", "..")):
            return f"{value!r} becomes part of the name of a file or folder, and must not be empty or a path"
        if isinstance(value, list) and len(value) < self.fewest:
            return f"{value} has fewer than {self.fewest} items"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if self.exact:
            return f"expected a whole number, got {value!r}" if self._is_whole_float(value) else None
        if value == math.inf:
            return f"{value} is not finite"
        if value < self.lowest or value == -math.inf:
            return f"{value} is below {self.lowest:,}"
        if value > self.highest:
            return f"{value} is above {self.highest:,}"
        if value <= self.above and value > -math.inf:
            return f"{value} is not above {self.above:,}"
        if value >= self.below:
            return f"{value} is not below {self.below:,}"
        return None

    def _is_whole_float(self, value: float) -> bool:
        return (
            int in self.kinds and float not in self.kinds and isinstance(value, float) and value.is_integer()
        )

    def _other_word(self, value: str) -> str:
        words = [*self.choices, *(["null"] if NONE in self.kinds else [])]
        meant = nearest(value, self.choices)
        advice = f"; {meant}" if meant.startswith("did you mean") else ""
        none_of = f"neither {' nor '.join(words)}" if len(words) > 1 else f"not {words[0]}"
        return f"{value!r} is {none_of}{advice}"

    def whole(self, value: Any) -> Any:
        """The value, a whole float as an int where a whole number is wanted (5e3 arrives as a float)."""
        if self.section is not None and isinstance(value, dict):
            return whole_numbers(value, self.section.declared())
        return int(value) if isinstance(value, float) and self._is_whole_float(value) else value


@dataclass(frozen=True)
class Network(Option):
    """The section ``network_X`` of a network.

    Attributes:
        in_state: Whether training changes it, so that it is part of the training state.
    """

    kinds: tuple[type, ...] = (dict, NONE)
    in_state: bool = False


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of a class of options.

    Args:
        default: The value where the option is absent.
        help: One sentence.
        limits: Of :class:`Option`: ``lowest``, ``highest``, ``above``, ``below``, ``choices``, ``required`` and so on.
    """
    declared = Option(help=help, default=default, **limits)
    return field(default_factory=lambda: copy.copy(default), metadata={"option": declared})


def loss(help: str, *losses: type) -> Any:
    """A field for the section of a loss, or null: one of ``losses``, or any where none is named."""
    return option(None, help, losses=losses)


@typing.dataclass_transform(field_specifiers=(option, loss), frozen_default=True, kw_only_default=True)
@dataclass(frozen=True)
class Options:
    """Base of the classes that declare options. Subclasses inherit those of their bases."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    @cache
    def declared(cls) -> dict[str, Option]:
        """The options by name."""
        kinds = typing.get_type_hints(cls)
        return {
            each.name: each.metadata.get("option", Option()).of_annotation(kinds[each.name])
            for each in fields(cls)
        }

    @classmethod
    def read(cls, section: Mapping[str, Any] | None) -> Self:
        """The values of a section, defaults filled in; keys of others in the same section are left alone."""
        values = {}
        for name, declared in cls.declared().items():
            if declared.section is not None:
                values[name] = declared.section.read((section or {}).get(name))
            elif section and name in section:
                values[name] = declared.whole(section[name])
        return cls(**values)


def whole_numbers(options: Mapping[str, Any], declared: Mapping[str, Option]) -> dict[str, Any]:
    """A copy of a section with ints for the whole floats where a whole number is wanted."""
    return {key: declared[key].whole(value) if key in declared else value for key, value in options.items()}


# ------------------------------------------------------------------------------------------------------- the check

_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a section",
    NONE: "null",
}


def describe(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    return "a section" if isinstance(value, dict) else repr(value)


def is_kind(value: Any, kind: type) -> bool:
    """Whether a value is of a kind: a whole float is an ``int``, an ``int`` a ``float``, a tuple a list, NaN none."""
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return not isinstance(value, bool) and (
            isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        )
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return isinstance(value, list | tuple) if kind is list else isinstance(value, kind)


def check_kind(
    value: Any, kinds: type | tuple[type, ...], place: str, problems: list[str], shown: type | None = None
) -> bool:
    """Reports a value of none of the kinds (``shown`` stands for them); returns whether it is fine."""
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    if any(is_kind(value, kind) for kind in wanted):
        return True
    wanted = wanted if shown is None else (shown,)
    names = [_KIND_NAMES[kind] for kind in wanted if kind is not int or float not in wanted]
    problems.append(f"{place}: expected {' or '.join(names)}, got {describe(value)}")
    return False


def check_value(value: Any, wanted: Option, place: str, problems: list[str]) -> bool:
    """Reports a value that is not of the kinds, or not valid; returns whether it is fine."""
    before = len(problems)
    if wanted.section is not None and value is None:
        return True
    if wanted.kinds and not check_kind(value, wanted.kinds, place, problems, wanted.shown):
        return False
    if isinstance(value, dict) and wanted.section is not None:
        check_section(value, wanted.section.declared(), place, problems)
    elif isinstance(value, list) and wanted.item is not None:
        for index, item in enumerate(value):
            check_value(item, wanted.item, f"{place}.{index}", problems)
    if problem := wanted.problem(value):
        problems.append(f"{place}: {problem}")
    return len(problems) == before


def check_section(
    options: Any,
    declared: Mapping[str, Option],
    place: str,
    problems: list[str],
    *,
    phase: str = "",
    skip: Iterable[str] = (),
    callee: str = "",
) -> None:
    """Checks a section: names, values, and what has to be there.

    Args:
        options: The section.
        declared: The valid keys.
        place: The section's name, for messages.
        problems: Gets what is wrong.
        phase: ``train`` or ``test``, for what only one of them requires.
        skip: Keys that somebody else checks.
        callee: What gets the options as its arguments, for messages.
    """
    if not check_kind(options, dict, place, problems):
        return
    ignored = set(skip)
    for key, value in options.items():
        if key in ignored:
            continue
        here = f"{place}.{key}" if place else key
        if key in declared:
            check_value(value, declared[key], here, problems)
        else:
            unknown = f"{callee} has no such parameter" if callee else "unknown key"
            problems.append(f"{here}: {unknown}; {nearest(str(key), {*declared, *ignored})}")
    for key, wanted in declared.items():
        # an argument may be null where its function takes that
        absent = key not in options if callee else options.get(key) is None
        if wanted.required in ("always", phase) and wanted.required and absent and key not in ignored:
            by = f" by {callee}" if callee else ""
            problems.append(f"{f'{place}.' if place else ''}{key}: is required{by}")
