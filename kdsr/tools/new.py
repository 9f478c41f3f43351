"""``kdsr new``: writes the option file of a method, a backbone, a data set and a schedule, without importing torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kdsr.options.compose import Choice, Pieces, options_folder
from kdsr.options.files import load
from kdsr.runtime.atomic_files import atomic_write, display_path
from kdsr.runtime.errors import OptionError


def _table(rows: Iterable[tuple[str, str]]) -> str:
    shown = list(rows)
    width = max((len(first) for first, _ in shown), default=0)
    return "\n".join(f"  {first:{width}}  {second}".rstrip() for first, second in shown)


def listing(
    pieces: Pieces, method: str | None, backbone: str | None, data: str | None, scale: int | None
) -> str:
    """Returns a table of the valid combinations with the given names."""
    choices = [
        one
        for one in pieces.choices()
        if method in (None, one.method)
        and backbone in (None, one.backbone)
        and data in (None, one.data)
        and scale in (None, one.scale)
    ]
    if not choices:
        raise OptionError("no combination has these names; kdsr new --list lists all combinations")
    backbones: dict[str, dict[str, None]] = {}
    scales: dict[str, set[int]] = {}
    for one in choices:
        backbones.setdefault(one.method, {})[one.backbone] = None
        scales.setdefault(one.data, set()).add(one.scale or 1)
    sets = [
        (name, ", ".join(f"x{scale}" for scale in sorted(its) if scale > 1))
        for name, its in sorted(scales.items())
    ]
    schedules = [(name, _comment(piece)) for name, piece in pieces.schedules.items()]
    parts = {
        "--method, and its --backbone": [(name, ", ".join(its)) for name, its in backbones.items()],
        "--data, and its --scale": sets,
        "--schedule": schedules,
    }
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in parts.items())


def _comment(piece: Path) -> str:
    """Returns the first sentence of a piece's comment, up to the end of the line."""
    lines = piece.read_text(encoding="utf-8").splitlines()
    return next((line[2:] for line in lines if line.startswith("# ") and "$schema" not in line), "").split(
        ". "
    )[0]


def missing_files(options: Any, key: str = "") -> Iterable[tuple[str, str]]:
    """Yields missing checkpoints and data folders of an option file, each with its option."""
    for name, value in options.items() if isinstance(options, dict) else ():
        below = f"{key}.{name}" if key else name
        if isinstance(value, dict):
            yield from missing_files(value, below)
        elif name.startswith(("dataroot_", "pretrain_network_")):
            files = value if isinstance(value, list) else [value]
            yield from ((file, below) for file in files if file and not os.path.exists(file))


def new(
    method: Annotated[str | None, typer.Option(help="Such as FAKD, or your own piece, a .yml file.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Teacher and student, such as EDSR, or a .yml file.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Training set, such as DIV2K, or a .yml file.")] = None,
    scale: Annotated[int | None, typer.Option(help="Upscaling factor, if the data set has several.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Such as SR_250k; default: that of the method or the backbone.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file; default: options/train/NAME.yml."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="List the valid combinations; further options filter the list.")
    ] = False,
) -> None:
    """Write the option file of a method, a backbone and a data set: kdsr new --method FAKD --backbone EDSR --data
    DIV2K --scale 4."""
    options = options_folder()
    if options is None:
        raise OptionError(
            "kdsr new: there is no folder options/_base_ here, and the installed package has no pieces; run it in a "
            "clone of kdsr's repository"
        )
    pieces = Pieces(options)
    if list_:
        typer.echo(listing(pieces, method, backbone, data, scale))
        return
    if method is None or backbone is None or data is None:
        given = {"--method": method, "--backbone": backbone, "--data": data}
        missing = [f"{flag}: missing" for flag, value in given.items() if value is None]
        raise OptionError([*missing, "kdsr new --list lists the valid names"])
    recipe = pieces.compose(Choice(method, backbone, data, scale, schedule))
    file = output or options / "train" / f"{recipe.name}.yml"
    if os.path.lexists(file) and not force:
        raise OptionError(
            f"{display_path(file)}: exists; use --force to overwrite it, or -o FILE for another"
        )
    if output:
        recipe = replace(recipe, name=output.stem)
    atomic_write(file, lambda out: out.write(recipe.text(file, options).encode()))
    typer.echo(f"{display_path(file)} is composed of")
    typer.echo(_table((display_path(piece), why) for piece, why in recipe.pieces))
    absent = list(missing_files(load(file)))
    if absent:
        typer.echo("Missing files (datasets/README.md, experiments/pretrained_models/README.md):")
        typer.echo(_table(absent))
    typer.echo(f"Train: kdsr train -opt {display_path(file)}")
