"""``kdsr show``: prints the resolved options of a file with the origin of each value, without importing torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from kdsr.options.files import BASE_KEY, SafeOptionLoader, load
from kdsr.options.overrides import first_keys

Place = tuple[str, ...]


def origins(file: Path) -> dict[Place, str]:
    """Returns ``FILE:LINE`` of the last definition of each option in a file and its ``_base_`` pieces, by its keys."""
    found: dict[Place, str] = {}

    def note(node: yaml.Node | None, place: Place) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if place or key.value != BASE_KEY:
                here = (*place, key.value)
                found[here] = f"{os.path.normpath(file)}:{key.start_mark.line + 1}"
                note(value, here)

    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=SafeOptionLoader)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == BASE_KEY:
            for name in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if name.value:
                    found |= origins(file.parent / Path(name.value).expanduser())
    note(node, ())
    return found


def leaves(options: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yields the values of an option tree with their keys; a list is one value."""
    if isinstance(options, dict) and options:
        for key, value in options.items():
            yield from leaves(value, (*place, key))
    else:
        yield place, options


def resolved(file: Path, overrides: list[str]) -> dict[Place, tuple[Any, str]]:
    """Returns the resolved values of a file with its pieces and overrides, each with its origin."""
    options = load(file, overrides)
    places = origins(file.expanduser())
    for entry in overrides:
        place = tuple(first_keys(options, entry))
        places = {other: origin for other, origin in places.items() if other[: len(place)] != place}
        places[place] = f"--force_yml {entry}"
    return {
        place: (
            value,
            next((places[place[:end]] for end in range(len(place), 0, -1) if place[:end] in places), ""),
        )
        for place, value in leaves(options)
    }


def text_of(value: Any) -> str:
    """Formats a value as one line of YAML."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        .split("\n...")[0]
        .strip()
    )


def show(
    words: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="as --force_yml"),
    opt: Path = typer.Option(..., "-opt", "--opt", metavar="FILE", help="option file"),
    force_yml: list[str] = typer.Option([], "--force_yml", metavar="KEY:KEY=VALUE", help="overrides"),
    diff: Path = typer.Option(None, "--diff", metavar="OTHER", help="print only what differs from this file"),
) -> None:
    """Print the resolved options of a file, each value with its file and line."""
    mine = resolved(opt, [*force_yml, *(words or [])])
    if diff is not None:
        other = resolved(diff, [])
        for place in dict.fromkeys([*mine, *other]):
            theirs, ours = other.get(place), mine.get(place)
            if (theirs or (None,))[0] == (ours or (None,))[0]:
                continue
            typer.echo(f"{'.'.join(place)}:")
            for sign, found in (("-", theirs), ("+", ours)):
                typer.echo(f"  {sign} " + (f"{text_of(found[0])}  # {found[1]}" if found else "not given"))
        return
    above: Place = ()
    for place, (value, origin) in mine.items():
        for depth in range(len(place) - 1):
            if place[: depth + 1] != above[: depth + 1]:
                typer.echo(f"{'  ' * depth}{text_of(place[depth])}:")
        above = place
        typer.echo(f"{'  ' * (len(place) - 1)}{text_of(place[-1])}: {text_of(value)}  # {origin}")
