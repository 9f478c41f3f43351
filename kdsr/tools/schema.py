"""``kdsr schema``: writes the schema and the reference of the options."""

from __future__ import annotations

from pathlib import Path

import typer


def schema(
    folder: Path = typer.Argument(Path("."), help="checkout of kdsr", exists=True, file_okay=False),
) -> None:
    """Write options/schema.json, for editors, and docs/option_reference.md."""
    from kdsr.options.json_schema import as_text, json_schema
    from kdsr.options.reference import reference

    for name, text in (
        ("options/schema.json", as_text(json_schema())),
        ("docs/option_reference.md", reference()),
    ):
        (folder / name).write_text(text, encoding="utf-8")
        typer.echo(folder / name)
