"""Reads option files: safe YAML, ``_base_`` pieces, deep merge and ``${reference}`` interpolation.

Object tags are refused, a duplicate key is an error, and ``1e-4`` is a number (a string in YAML 1.1).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdsr.options.overrides import apply_overrides
from kdsr.runtime.errors import OptionError

BASE_KEY = "_base_"
REPLACE_KEY = "_replace_"
_STANDARD_TAG = "tag:yaml.org,2002:"
FLOAT_TAG = f"{_STANDARD_TAG}float"
EXPONENT_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
MOST_CHARACTERS, MOST_VALUES = 1_000_000, 100_000  # limits per file; a template has 3000 and 100
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")


class SafeOptionLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but duplicate keys are errors, ``1e-4`` is a float and dates are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == f"{_STANDARD_TAG}merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"option names are text, {key!r} is not", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key} occurs twice (first on line {seen[key]})", key_node.start_mark
                )
            seen[key] = key_node.start_mark.line + 1
        # deep: an alias to its own node raises an error instead of creating a cyclic dict
        return super().construct_mapping(node, deep=True)

    def construct_sequence(self, node: yaml.SequenceNode, deep: bool = False) -> list[Any]:
        return super().construct_sequence(node, deep=True)

    def refuse_tag(self, node: yaml.Node) -> Any:
        tag = node.tag.replace(_STANDARD_TAG, "!!")
        raise yaml.constructor.ConstructorError(
            None, None, f"tag {tag} is refused: option files hold plain values only", node.start_mark
        )


# without this, dates would become datetime objects
SafeOptionLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_STANDARD_TAG}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SafeOptionLoader.add_implicit_resolver(FLOAT_TAG, EXPONENT_FLOAT, list("-+.0123456789"))
SafeOptionLoader.add_constructor(f"{_STANDARD_TAG}map", SafeOptionLoader.construct_mapping)
SafeOptionLoader.add_constructor(f"{_STANDARD_TAG}seq", SafeOptionLoader.construct_sequence)
SafeOptionLoader.add_constructor(None, SafeOptionLoader.refuse_tag)


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML text into plain values.

    Args:
        text: The YAML document.
        where: The file or override, for messages.

    Raises:
        OptionError: Syntax error, duplicate key, object tag or several documents, with ``where`` and the line.
    """
    try:
        return _unshared(yaml.load(text, Loader=SafeOptionLoader), [MOST_VALUES])  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise OptionError(f"{where}:{line} {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{where}: {error}") from error


def _unshared(value: Any, left: list[int]) -> Any:
    """Copies a value so that aliases share no dict, because a later change would affect all of them.

    Raises:
        ValueError: The expanded aliases exceed ``MOST_VALUES``.
    """
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"has more than {MOST_VALUES:,d} values with expanded aliases")
    if isinstance(value, dict):
        return {key: _unshared(below, left) for key, below in value.items()}
    return [_unshared(below, left) for below in value] if isinstance(value, list) else value


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merges two option trees into a new one: sections are merged, other values (lists too) are replaced.

    A section of ``over`` with ``_replace_: true`` replaces the one of ``base``; ``null`` disables it.
    """
    merged = dict(base)
    for key, value in over.items():
        if not isinstance(value, dict):
            merged[key] = value
            continue
        below: Any = merged.get(key)
        merges = isinstance(below, dict) and value.get(REPLACE_KEY) is not True
        kept = {k: v for k, v in value.items() if k != REPLACE_KEY}
        merged[key] = merge(below if merges else {}, kept)
    return merged


def read_file(path: Path, _above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], bool]:
    """Reads one file and its ``_base_`` pieces.

    Returns:
        The merged options, not yet interpolated, and whether the file has ``_base_`` pieces.
    """
    resolved = path.resolve()
    if resolved in _above:
        chain = " -> ".join(str(p) for p in (*_above, resolved))
        raise OptionError(f"{BASE_KEY} is circular: {chain}")
    source = f" ({BASE_KEY} of {_above[-1]})" if _above else ""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise OptionError(f"option file {path}{source}: {reason}{_how_to_make(path)}") from error
    if len(text) > MOST_CHARACTERS:
        raise OptionError(f"option file {path}{source}: has more than {MOST_CHARACTERS:,d} characters")
    options = parse_yaml(text, str(path))
    if not isinstance(options, dict):
        found = "empty" if options is None else f"a {type(options).__name__}"
        raise OptionError(f"{path}: an option file is a mapping of keys to values, this one is {found}")
    bases = options.pop(BASE_KEY, None)
    names = [] if bases is None else bases if isinstance(bases, list) else [bases]
    merged: dict[str, Any] = {}
    for name in names:
        if not isinstance(name, str):
            raise OptionError(f"{path}: {BASE_KEY} must be a file name or a list of file names, not {name!r}")
        piece, _ = read_file(path.parent / Path(name).expanduser(), (*_above, resolved))
        merged = merge(merged, piece)
    return merge(merged, options), bool(names)


def _how_to_make(path: Path) -> str:
    """Returns a hint with the ``kdsr new`` command for a missing file, if its name is that of a combination."""
    from kdsr.options.compose import new_command  # circular import

    command = None if path.exists() else new_command(path)
    return f"; create it with:\n  {command}" if command else ""


def _look_up(options: Any, name: str) -> Any:
    value = options
    for part in name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(name)
    return value


def interpolate(options: dict[str, Any], where: str) -> dict[str, Any]:
    """Replaces every ``${a.b}`` by the value of option ``a.b``; a value that is only a reference takes its type.

    Raises:
        OptionError: All unknown or circular references, and references to sections within text.
    """
    problems: list[str] = []

    def resolve(value: Any, place: str, open_names: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {k: resolve(v, f"{place}.{k}" if place else k, open_names) for k, v in value.items()}
        if isinstance(value, list):
            return [resolve(v, f"{place}.{i}", open_names) for i, v in enumerate(value)]
        if not isinstance(value, str):
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole:
            return refer(whole.group(1).strip(), place, open_names, in_text=False)
        return _REFERENCE.sub(
            lambda found: str(refer(found.group(1).strip(), place, open_names, in_text=True)), value
        )

    def refer(name: str, place: str, open_names: tuple[str, ...], in_text: bool) -> Any:
        if name in open_names:
            problems.append(f"{where}: {place}: ${{{name}}} refers to itself")
            return None
        try:
            target = _look_up(options, name)
        except KeyError:
            problems.append(f"{where}: {place}: ${{{name}}} refers to an option that does not exist")
            return None
        if in_text and isinstance(target, dict | list):
            problems.append(
                f"{where}: {place}: ${{{name}}} is not a single value and cannot be used within text"
            )
            return None
        return resolve(copy.deepcopy(target), place, (*open_names, name))

    resolved = resolve(options, "", ())
    if problems:
        raise OptionError(list(dict.fromkeys(problems)))
    return resolved


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Loads an option file: merges pieces, applies overrides and resolves references, without the option check.

    Args:
        path: The YAML file.
        overrides: ``a:b=value`` entries, applied before references are resolved, so ``scale=3`` changes every
            ``${scale}``.

    Returns:
        Nested dicts.

    Raises:
        OptionError: The file cannot be read or an override is invalid; with file and line, or the override.
    """
    return load_with_origin(path, overrides)[0]


def load_with_origin(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], bool]:
    """Like :func:`load`; also returns whether the file has ``_base_`` pieces."""
    options, composed = read_file(Path(path).expanduser())

    def expand(value: Any) -> Any:
        whole = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        try:
            return copy.deepcopy(_look_up(options, whole.group(1).strip())) if whole else value
        except KeyError:
            return value  # reported by the interpolation

    apply_overrides(options, overrides, parse_yaml, expand)
    return interpolate(options, str(path)), composed
