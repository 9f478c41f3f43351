"""Looks up registered names, and derives options from the signatures of constructors and functions."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from kdsr.runtime.declarations import NONE, Option, check_section
from kdsr.runtime.suggestions import nearest

_LONGEST_NAME = 200  # bytes; file systems take 255, and logs and archived folders are named after the run


def registered(registry: Any) -> dict[str, Any]:
    """Returns the entries of a BasicSR registry by name; as in BasicSR, ``NAME`` also finds ``NAME_basicsr``."""
    entries = dict(iter(registry))
    for name, entry in list(entries.items()):
        if name.endswith("_basicsr"):
            entries.setdefault(name.removesuffix("_basicsr"), entry)
    return entries


def find_type(
    options: Mapping[str, Any], known: Mapping[str, Any], place: str, problems: list[str], own: bool = True
) -> Any | None:
    """Returns the entry for ``options['type']``; reports a missing or unknown type.

    Args:
        options: The section.
        known: The valid entries by name.
        place: The section's name, for messages.
        problems: Receives the problems.
        own: Whether a user's modules can register further entries.
    """
    name = options.get("type")
    if name is None:
        problems.append(f"{place}.type: is required")
    elif not isinstance(name, str) or name not in known:
        offer = nearest(str(name), known)
        hint = (
            " (for a type of your own, add its module to import_modules)"
            if own and offer.startswith("valid")
            else ""
        )
        problems.append(f"{place}.type: {name!r} is not known; {offer}{hint}")
    else:
        return known[name]
    return None


def folder_name_problems(name: str) -> list[str]:
    """Checks the name of a run, which is also the name of its folder."""
    if not name.strip():
        return ["name: is required" if not name else f"name: {name!r} has only spaces"]
    if name in (".", ".."):
        return [f"name: {name!r} is not the name of a new folder; choose another"]
    if "/" in name:
        return [
            f"name: {name} must be the name of a folder, not a path (path.experiments_root sets its parent folder)"
        ]
    if name != name.strip() or not name.isprintable():
        return [f"name: {name!r} has spaces at its ends, or characters that cannot be printed"]
    if len(name.encode()) > _LONGEST_NAME:
        return [f"name: {name[:20]}… is longer than {_LONGEST_NAME} bytes; files are named after it"]
    return []


def _by_default(default: Any) -> Option:
    """Derives the valid kinds of a parameter without annotation from its default, where that is unambiguous."""
    if isinstance(default, bool):
        return Option(kinds=(bool, int, NONE), shown=bool)
    if isinstance(default, int | float):
        return Option(kinds=(int, float, bool, list, NONE), shown=type(default))  # img_size=64 may be a pair
    if isinstance(default, str):
        return Option(kinds=(str, NONE), shown=str)
    return Option(kinds=(list, NONE), shown=list) if isinstance(default, list | tuple) else Option()


def _parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the named parameters of a constructor or function.

    If a class takes ``**kwargs``, the parameters of its base class are added; none of them is required, because the
    class may set them itself. Other ``**kwargs`` are ignored: BasicSR's accept misspelt names.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(target).parameters
    own = {name: p for name, p in parameters.items() if p.kind in named}
    base = target.__mro__[1] if isinstance(target, type) and target is not object else object
    if base is object or all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return own
    optional = {
        name: p.replace(default=None) if p.default is inspect.Parameter.empty else p
        for name, p in _parameters_of(base).items()
    }
    return {**optional, **own}


def described_arguments(target: Any) -> dict[str, str]:
    """Returns the descriptions of arguments under ``Args:`` in a docstring, for a class also of its bases."""
    found: dict[str, str] = {}
    for documented in reversed(target.__mro__ if isinstance(target, type) else (target,)):
        text = inspect.cleandoc(getattr(documented, "__doc__", None) or "")
        section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
        for names, description in re.findall(
            r"^ {4}([\w, ]+?)(?: ?\([^)]*\))?: (.+(?:\n {5,}.+)*)",
            section[1] if section else "",
            re.MULTILINE,
        ):
            found |= dict.fromkeys(names.split(", "), " ".join(description.split()).replace("``", "`"))
    return found


def options_of(target: Callable[..., Any], given: Iterable[str] = ()) -> dict[str, Option]:
    """Returns the arguments of a class or function as options, from its signature and docstring.

    Args:
        target: The class or function.
        given: Parameters that the caller sets (an optimizer's ``params``).
    """
    made_by: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        annotations = typing.get_type_hints(made_by)
    except (NameError, TypeError):  # an annotation for the type checker only
        annotations = {}
    described, found = described_arguments(target), {}
    for name, parameter in _parameters_of(target).items():
        if name in given:
            continue
        default = None if parameter.default is parameter.empty else parameter.default
        if name in annotations:
            declared = Option(exact=True).of_annotation(annotations[name])
            if parameter.default is None and declared.kinds:
                declared = replace(declared, kinds=(*dict.fromkeys((*declared.kinds, NONE)),))
        else:
            declared = _by_default(default)
        found[name] = replace(
            declared,
            help=described.get(name, ""),
            default=list(default) if isinstance(default, tuple) else default,
            required="always" if parameter.default is parameter.empty else None,
        )
    return found


def check_call(
    target: Callable[..., Any],
    options: Mapping[str, Any],
    place: str,
    problems: list[str],
    *,
    declared: Mapping[str, Option] | None = None,
) -> None:
    """Checks a section, without ``type``, as the arguments of a class or function.

    Args:
        target: A class or function.
        options: The section.
        place: The section's name, for messages.
        problems: Receives unknown names, missing arguments and values of a wrong kind.
        declared: The options that are valid; by default those of ``target``.
    """
    check_section(
        {key: value for key, value in options.items() if key != "type"},
        options_of(target) if declared is None else declared,
        place,
        problems,
        callee=getattr(target, "__name__", str(target)),
    )
