"""Overrides on the command line, ``a:b=value`` (BasicSR's ``--force_yml``), without ``exec`` or ``eval``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kdsr.runtime.errors import OptionError


def split_override(entry: str) -> tuple[list[str], str]:
    """Splits ``a:b=value`` at its first ``=`` into keys and the text of the value.

    Raises:
        OptionError: No ``=`` or an empty key.
    """
    path, equals, value = entry.partition("=")
    keys = [key.strip() for key in path.split(":")]
    if not equals or not all(keys):
        raise OptionError(f"override {entry!r}: expected key:key=value, for example train:optim_g:lr=1e-4")
    return keys, value.strip()


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
        entries: ``a:b=value``; a numeric key indexes a list; the value is YAML (number, boolean, null, list,
            section or text) and may contain ``=``.
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
        node: Any = options
        for depth, key in enumerate(keys[:-1]):
            node = _step_into(node, key, ".".join(keys[:depth]), entry, expand)
        place = ".".join(keys[:-1])
        if isinstance(node, list):
            node[_list_index(node, keys[-1], place, entry)] = value
        else:
            node[keys[-1]] = value
