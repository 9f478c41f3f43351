"""``kdsr fetch``: published weights and data sets, by name or by what an option file lacks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from kdsr.deploy.downloads import Download, find, lacking, read_table
from kdsr.deploy.fetch import fetch
from kdsr.deploy.http_download import DownloadError
from kdsr.runtime.errors import OptionError


def listing(table: Iterable[Download]) -> str:
    """All names with size, licence and place, and what of them cannot be downloaded or has not been tried."""
    lines = []
    for entry in table:
        state = "is there" if entry.is_there else "" if entry.source else "by hand"
        untried = "" if entry.tried or not entry.source else "not tried"
        notes = ", ".join(filter(None, (state, untried)))
        lines += [
            f"{', '.join((entry.name, *entry.also))}{f'  ({notes})' if notes else ''}",
            f"    {entry.what}; {entry.shown_size}, licence: {entry.licence}",
            f"    {entry.source or entry.page} -> {entry.to}",
        ]
    return "\n".join(
        [
            *lines,
            "",
            "by hand: no program can download it; fetch names the page.",
            "not tried: the address was looked up in public documentation; this download has not been run.",
        ]
    )


def _plan(entry: Download) -> str:
    if not entry.source:
        return entry.by_hand
    return f"{entry.name}: {entry.source} ({entry.shown_size}) -> {entry.to}"


def fetch_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="See --list.")] = None,
    opt: Annotated[
        Path | None, typer.Option("-opt", "--opt", metavar="FILE", help="Get what this option file lacks.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Print all names, and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be downloaded, and stop.")
    ] = False,
) -> None:
    """Get published weights and data sets; a file or folder that is there is kept."""
    table = read_table()
    if show_list:
        typer.echo(listing(table.values()))
        return
    if bool(names) == (opt is not None):
        raise OptionError("give names (kdsr fetch --list) or -opt FILE")
    chosen, unknown = [], []
    if opt is not None:
        found = lacking(opt, table)
        chosen, commands = found.downloads, found.commands
        unknown = [f"{line} is not in the table; see datasets/README.md" for line in found.unknown]
        if not (chosen or commands or unknown):
            typer.echo(f"{opt} lacks nothing")
    else:
        wanted = find(names or [], table)
        for entry in wanted:
            if entry.is_there:
                typer.echo(f"{entry.name}: {entry.to} is there and is kept")
        chosen = [entry for entry in wanted if not entry.is_there]
        commands = {step["run"]: entry for entry in wanted for step in entry.then}
    if dry_run:
        typer.echo("\n".join([*map(_plan, chosen), *unknown, *(f"then: {command}" for command in commands)]))
        return
    problems = []
    try:
        fetch(chosen, lambda entry: typer.echo(f"{entry.name}: {entry.to}"))
    except DownloadError as error:
        problems = error.problems
    for command, entry in commands.items():
        if entry.is_there:
            typer.echo(f"then: {command}")
    if problems or unknown:
        raise DownloadError([*problems, *unknown])
