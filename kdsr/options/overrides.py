"""Overrides on the command line, ``a:b=value`` (BasicSR's ``--force_yml``), without ``exec`` or ``eval``.

``a.b=value`` is the same: in a path without a colon, dots separate keys. A colon makes a path exact, so that a key
which contains a dot can be written (``weights:body.3=2``); without one, a key that is there as it is written counts.
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
    """Those of the entries that set the option ``keys``, or a section that it is in."""
    return [entry for entry in entries if keys[: len(found := split_override(entry)[0])] == tuple(found)]


def _separator(path: str) -> str:
    return ":" if ":" in path else "."


def _first_key(node: Any, keys: list[str]) -> tuple[str, list[str]]:
    """The first of ``keys`` and the others. Dots have split them: the longest that is a key of ``node`` counts."""
    for count in range(len(keys), 1, -1):
        if isinstance(node, dict) and (key := ".".join(keys[:count])) in node:
            return key, keys[count:]
    return keys[0], keys[1:]


def first_keys(options: Any, entry: str) -> list[str]:
    """The keys that an override sets, in options to which it has been applied."""
    keys, _ = split_override(entry)
    exact, node, found = _separator(entry.partition("=")[0]) == ":", options, []
    while keys:
        key, keys = (keys[0], keys[1:]) if exact else _first_key(node, keys)
        found.append(key)
        node = node.get(key) if isinstance(node, dict) else None
    return found


def _step_into(node: Any, key: str, place: str, entry: str, expand: Callable[[Any], Any]) -> Any:
    """The section or list below ``node`` at ``key``; a section that is absent or off is made."""
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
        raise OptionError(f"override {entry!r}: {place} is a list of {len(items)}, {key!r} is no index of it")
    return int(key)


def apply_overrides(
    options: dict[str, Any],
    entries: Sequence[str],
    parse_value: Callable[[str, str], Any],
    expand: Callable[[Any], Any],
) -> None:
    """Applies overrides in place, one after the other.

    Args:
        options: The merged options.
        entries: ``a:b=value`` or ``a.b=value``; a numeric key indexes a list; the value is YAML (number, boolean,
            null, list, section or text) and may contain ``=``.
        parse_value: ``(text, name for messages) -> value``.
        expand: Turns a value that refers to a section (``${network_t}``) into a copy of that section, which
            the override then changes; gives back any other value.

    Raises:
        OptionError: A malformed entry. An unknown key is left to the option check, which names the nearest
            ones.
    """
    for entry in entries:
        keys, text = split_override(entry)
        value = parse_value(text, f"override {entry!r}")
        if not text or text.lower() == "none":  # as on BasicSR's command line: empty text, null
            value = None if text else ""
        if isinstance(value, dict) and value.get("_replace_") is True:
            del value["_replace_"]  # a section replaces the one below in any case
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
