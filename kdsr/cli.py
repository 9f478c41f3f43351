"""The ``kdsr`` command: one subcommand per entry point and tool."""

from __future__ import annotations

import typer

import kdsr  # noqa: F401  first: makes BasicSR importable
from kdsr import test as test_entry
from kdsr import train as train_entry
from kdsr.prepare.commands import app as data_app
from kdsr.runtime.distributed import exit_rank
from kdsr.runtime.errors import report_errors
from kdsr.tools.bench import app as bench_app
from kdsr.tools.bench_tiles import tiles
from kdsr.tools.demo import demo
from kdsr.tools.new import new
from kdsr.tools.tables import list_templates

app = typer.Typer(
    help="Knowledge distillation for image restoration, inside BasicSR.",
    no_args_is_help=True,
    add_completion=False,
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON)
def train(context: typer.Context) -> None:
    """Train what an option file describes: kdsr train -opt FILE [BasicSR's flags]."""
    raise typer.Exit(train_entry.main(context.args))


@app.command(context_settings=_PASS_ON)
def test(context: typer.Context) -> None:
    """Test what an option file describes, or a run: kdsr test -opt FILE, kdsr test experiments/NAME [flags]."""
    raise typer.Exit(test_entry.main(context.args))


app.command()(demo)
app.command()(new)
app.command("list")(list_templates)
app.add_typer(data_app, name="data", help="Prepare data sets.")
bench_app.command()(tiles)
app.add_typer(
    bench_app, name="bench", help="Measure time and memory of a training step, or of a large image."
)


def main() -> None:
    """Entry point of the console script."""
    try:
        code = report_errors(app)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    raise SystemExit(exit_rank(code))


if __name__ == "__main__":
    main()
