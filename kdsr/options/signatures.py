"""Names, kinds and signatures: what the option check is made of."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kdsr.runtime.option_values import Allowed
from kdsr.runtime.suggestions import nearest as nearest  # part of what the checks are made of

NUMBER = (int, float)
_LONGEST_NAME = 200  # bytes; file systems take 255, and logs and archived folders are named after the run


def registered(registry: Any) -> dict[str, Any]:
    """What a BasicSR registry offers, by name; as in BasicSR, ``NAME`` also finds ``NAME_basicsr``."""
    entries = dict(iter(registry))
    for name, entry in list(entries.items()):
        if name.endswith("_basicsr"):
            entries.setdefault(name.removesuffix("_basicsr"), entry)
    return entries


def find_type(
    options: Mapping[str, Any], known: Mapping[str, Any], place: str, problems: list[str], own: bool = True
) -> Any | None:
    """The entry that ``options['type']`` names; reports an absent or unknown one. Prints nothing.

    Args:
        options: The section.
        known: What there is, by name.
        place: The section's name, for messages.
        problems: Gets what is wrong.
        own: Whether a user's modules can add to what is known.
    """
    name = options.get("type")
    if name is None:
        problems.append(f"{place}.type: is required")
    elif not isinstance(name, str) or name not in known:
        offer = nearest(str(name), known)
        hint = (
            " (one of your own: name its module in import_modules)"
            if own and offer.startswith("valid")
            else ""
        )
        problems.append(f"{place}.type: {name!r} is not known; {offer}{hint}")
    else:
        return known[name]
    return None


def describe(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    return "a section" if isinstance(value, dict) else repr(value)


def folder_name_problems(name: str) -> list[str]:
    """Why ``name`` cannot be the name of a run: its folder is made, and one that is there moved aside, under it."""
    if not name.strip():
        return ["name: is required" if not name else f"name: {name!r} is empty but for spaces"]
    if name in (".", ".."):
        return [
            f"name: {name!r} is not the name of a new folder; choose another (a run moves aside a folder of its name)"
        ]
    if "/" in name:
        return [f"name: {name} must be the name of a folder, not a path (path.experiments_root says where)"]
    if name != name.strip() or not name.isprintable():
        return [f"name: {name!r} has spaces at its ends, or characters that cannot be shown"]
    if len(name.encode()) > _LONGEST_NAME:
        return [f"name: {name[:20]}… is longer than {_LONGEST_NAME} bytes; files are named after it"]
    return []


_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a section",
    types.NoneType: "null",
}


def is_kind(value: Any, kind: type) -> bool:
    """Whether a value is of a kind: a whole float is an ``int``, an ``int`` a ``float``, a list a tuple, NaN none."""
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return not isinstance(value, bool) and (
            isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        )
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return isinstance(value, list | tuple) if kind in (list, tuple) else isinstance(value, kind)


def check_kind(
    value: Any, kinds: type | tuple[type, ...], place: str, problems: list[str], shown: type | None = None
) -> bool:
    """Reports a value of none of the kinds (``shown`` stands for them); returns whether it is fine."""
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    if any(is_kind(value, kind) for kind in wanted):
        return True
    wanted = wanted if shown is None else (shown,)
    names = list(dict.fromkeys(_KIND_NAMES.get(kind, kind.__name__) for kind in wanted))
    if int in wanted and float in wanted:
        names.remove(_KIND_NAMES[int])
    problems.append(f"{place}: expected {' or '.join(names)}, got {describe(value)}")
    return False


def check_value(value: Any, wanted: Any, place: str, problems: list[str]) -> bool:
    """Reports a value that is not of the kinds, or not among those that are allowed; returns whether it is fine."""
    if not isinstance(wanted, Allowed):
        return check_kind(value, wanted, place, problems)
    if not check_kind(value, wanted.kinds, place, problems):
        return False
    problem = wanted.problem(value)
    if problem is not None:
        problems.append(f"{place}: {problem}")
    return problem is None


def make_counts_whole(options: Any, table: Mapping[str, Any]) -> None:
    """Turns whole floats into ints, in place, where a table wants whole numbers: 5e3 arrives as a float."""
    for key, value in options.items() if isinstance(options, dict) else ():
        wanted = table.get(key)
        if isinstance(wanted, Mapping):
            make_counts_whole(value, wanted)
            continue
        kinds = wanted.kinds if isinstance(wanted, Allowed) else wanted
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if int in kinds and float not in kinds and isinstance(value, float) and value.is_integer():
            options[key] = int(value)


def check_table(
    options: Any,
    table: Mapping[str, Any],
    place: str,
    problems: list[str],
    *,
    required: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> None:
    """Checks a section against a table ``key -> kind, kinds, Allowed, or a table of its own``.

    Args:
        options: The section.
        table: The valid keys.
        place: The section's name, for messages.
        problems: Gets what is wrong.
        required: Keys that must be there and not null.
        skip: Keys that somebody else checks.
    """
    if not check_kind(options, dict, place, problems):
        return
    ignored = set(skip)
    for key, value in options.items():
        if key in ignored:
            continue
        here = f"{place}.{key}" if place else key
        if key not in table:
            problems.append(f"{here}: unknown key; {nearest(str(key), {*table, *ignored})}")
        elif isinstance(table[key], Mapping):
            if value is not None:
                check_table(value, table[key], here, problems)
        else:
            check_value(value, table[key], here, problems)
    for key in required:
        if options.get(key) is None:
            problems.append(f"{place}.{key}: is required" if place else f"{key}: is required")


def _kinds_of_annotation(annotation: Any) -> tuple[type, ...] | None:
    """Plain kinds that an annotation allows; None where it says something else."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [_kinds_of_annotation(part) for part in typing.get_args(annotation)]
        return None if None in parts else tuple(kind for part in parts if part for kind in part)
    if isinstance(origin, type):
        annotation = list if issubclass(origin, Sequence) else origin
    if annotation is float:
        return NUMBER
    return (annotation,) if annotation in _KIND_NAMES else None


def _kinds_of_default(default: Any) -> tuple[type, ...] | None:
    """What a default says about a parameter without annotation: only what cannot be mistaken."""
    if isinstance(default, bool):
        return (bool, int, types.NoneType)
    if isinstance(default, int | float):
        return (*NUMBER, bool, list, types.NoneType)  # img_size=64 may be a pair
    if isinstance(default, str):
        return (str, types.NoneType)
    if isinstance(default, list | tuple):
        return (list, types.NoneType)
    return None


def parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a constructor or function.

    Where a class takes ``**kwargs``, those of the class that it is made from too, which it may fill in itself: none is
    required. Any other ``**kwargs`` counts as none: BasicSR's take any mistake.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(target).parameters
    own = {name: p for name, p in parameters.items() if p.kind in named}
    base = target.__mro__[1] if isinstance(target, type) and target is not object else object
    if base is object or all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return own
    optional = {
        name: p.replace(default=None) if p.default is inspect.Parameter.empty else p
        for name, p in parameters_of(base).items()
    }
    return {**optional, **own}


def check_call(
    target: Callable[..., Any],
    options: Mapping[str, Any],
    place: str,
    problems: list[str],
    *,
    given: Iterable[str] = (),
    extra: Iterable[str] = (),
) -> None:
    """Checks options against the signature of what they are passed to.

    Args:
        target: A class or function.
        options: Its keyword arguments, beside ``type``.
        place: The section's name, for messages.
        problems: Gets unknown names, missing arguments and values of an obviously wrong kind.
        given: Parameters that the caller fills in (an optimizer's ``params``); options cannot set them.
        extra: Keys that are valid here though no parameter (a metric's ``better``).
    """
    taken = set(given)
    parameters = {name: p for name, p in parameters_of(target).items() if name not in taken}
    valid = {*parameters, *extra}
    name = getattr(target, "__name__", str(target))
    try:
        made_by: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        annotations = typing.get_type_hints(made_by)
    except (NameError, TypeError):  # an annotation that exists for the type checker only
        annotations = {}
    for key, value in options.items():
        if key == "type":
            continue
        if key not in valid:
            problems.append(f"{place}.{key}: {name} has no such parameter; {nearest(key, valid)}")
            continue
        if key not in parameters:
            continue
        default = parameters[key].default
        annotated = key in annotations
        kinds = _kinds_of_annotation(annotations[key]) if annotated else _kinds_of_default(default)
        if kinds == (int,) and isinstance(value, float):
            problems.append(f"{place}.{key}: expected a whole number, got {value!r}")
        elif kinds and not (value is None and default is None):
            check_kind(value, kinds, f"{place}.{key}", problems, None if annotated else type(default))
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            problems.append(f"{place}.{key}: is required by {name}")
