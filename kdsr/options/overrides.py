"""Overrides on the command line, ``a:b=value`` (BasicSR's ``--force_yml``), without ``exec`` or ``eval``.

Without a colon, dots separate keys: ``a.b=value``. With a colon, keys may contain dots (``weights:body.3=2``). Without
a colon, an existing key that contains dots takes precedence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kdsr.runtime.errors import OptionError


def split_override(entry: str) -> tuple[list[str], str]:
    """Splits ``a:b=value`` or ``a.b=value`` at its first ``=`` into keys and the text of the value.

    Raises:
        OptionError: No ``=`` or an empty key.
    """
    path, equals, value = entry.partition("=")
    keys = [key.strip() for key in path.split(_separator(path))]
    if not equals or not all(keys):
        raise OptionError(f"override {entry!r}: expected key:key=value, for example train:optim_g:lr=1e-4")
    return keys, value.strip()


def overrides_of(entries: Sequence[str], *keys: str) -> list[str]:
    """Returns the entries that set the option ``keys`` or a section that contains it."""
    return [entry for entry in entries if keys[: len(found := split_override(entry)[0])] == tuple(found)]


def _separator(path: str) -> str:
    return ":" if ":" in path else "."


def _first_key(node: Any, keys: list[str]) -> tuple[str, list[str]]:
    """Returns the first of ``keys``, joined by dots to the longest key in ``node``, and the remaining ones."""
    for count in range(len(keys), 1, -1):
        if isinstance(node, dict) and (key := ".".join(keys[:count])) in node:
            return key, keys[count:]
    return keys[0], keys[1:]


def first_keys(options: Any, entry: str) -> list[str]:
    """Returns the keys that an override sets, in options to which it has been applied."""
    keys, _ = split_override(entry)
    exact, node, found = _separator(entry.partition("=")[0]) == ":", options, []
    while keys:
        key, keys = (keys[0], keys[1:]) if exact else _first_key(node, keys)
        found.append(key)
        node = node.get(key) if isinstance(node, dict) else None
    return found


def _step_into(node: Any, key: str, place: str, entry: str, expand: Callable[[Any], Any]) -> Any:
    """Returns the section or list ``node[key]``; creates a section that is missing or null."""
    index: Any = _list_index(node, key, place, entry) if isinstance(node, list) else key
    if isinstance(node, dict) and node.get(key) is None:
        node[key] = {}
    node[index] = below = expand(node[index])
    if not isinstance(below, dict | list):
        here = f"{place}.{key}" if place else key
        raise OptionError(f"override {entry!r}: {here} is a single value ({below!r}), not a section")
    return below


def _list_index(items: list[Any], key: str, place: str, entry: str) -> int:
    if not (key.isdigit() and int(key) < len(items)):
        raise OptionError(
            f"override {entry!r}: {place} is a list of {len(items)}, {key!r} is not an index of it"
        )
    return int(key)


def apply_overrides(
    options: dict[str, Any],
    entries: Sequence[str],
    parse_value: Callable[[str, str], Any],
    expand: Callable[[Any], Any],
) -> None:
    """Applies overrides in place, in order.

    Args:
        options: The merged options.
        entries: ``a:b=value`` or ``a.b=value``; a numeric key indexes a list; the value is YAML (number, boolean,
            null, list, section or text) and may contain ``=``.
        parse_value: ``(text, name for messages) -> value``.
        expand: Replaces a reference to a section (``${network_t}``) by a copy of that section; returns other values
            unchanged.

    Raises:
        OptionError: A malformed entry. Unknown keys are reported by the option check.
    """
    for entry in entries:
        keys, text = split_override(entry)
        value = parse_value(text, f"override {entry!r}")
        if not text or text.lower() == "none":  # as on BasicSR's command line: empty text, null
            value = None if text else ""
        if isinstance(value, dict) and value.get("_replace_") is True:
            del value["_replace_"]  # an override always replaces a section
        exact = _separator(entry.partition("=")[0]) == ":"
        node: Any = options
        place = ""
        while keys:
            key, keys = (keys[0], keys[1:]) if exact else _first_key(node, keys)
            if keys:
                node = _step_into(node, key, place, entry, expand)
                place = f"{place}.{key}" if place else key
            elif isinstance(node, list):
                node[_list_index(node, key, place, entry)] = value
            else:
                node[key] = value
