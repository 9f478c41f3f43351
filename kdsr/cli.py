"""The ``kdsr`` command: one subcommand per entry point and tool, each imported when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import kdsr
from kdsr import entry
from kdsr.runtime.errors import report_errors

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

# command -> module:function and help; or a group of commands and its help
_Commands = dict[str, tuple[Any, str]]
COMMANDS: _Commands = {
    "train": ("cli:train", "Train what an option file describes: kdsr train -opt FILE [BasicSR's flags]."),
    "test": (
        "cli:test",
        "Test what an option file describes, or a run: kdsr test -opt FILE, kdsr test experiments/NAME.",
    ),
    "distill": ("tools.distill:distill", "Distil a checkpoint into a smaller student, measured."),
    "infer": ("tools.infer:infer", "Restore images or folders of images with the network in a file."),
    "evaluate": (
        "tools.evaluate:evaluate",
        "Measure networks on benchmarks: PSNR and SSIM per set, as papers do.",
    ),
    "export": ("tools.export:export", "Write a network as ONNX, safetensors or .pt2, and check the file."),
    "profile": ("tools.profile:profile", "Parameters, operations, latency and memory of networks."),
    "fetch": (
        "tools.fetch:fetch_command",
        "Get published weights and data sets, or what an option file lacks.",
    ),
    "demo": ("tools.demo:demo", "Train a small student with and without distillation, and compare them."),
    "new": ("tools.new:new", "Write the option file of a method, a backbone, a data set and a schedule."),
    "list": ("tools.tables:list_templates", "Methods, tasks and backbones that have option files."),
    "show": ("tools.show:show", "Print the resolved options of a file, and where each value comes from."),
    "schema": (
        "tools.schema:schema",
        "Write options/schema.json, for editors, and docs/option_reference.md.",
    ),
    "data": (
        {
            "sample": (
                "prepare.commands:sample",
                "Make a small data set of photographs; nothing is downloaded.",
            ),
            "sr": ("prepare.commands:sr", "Make GT and LQ folders (Matlab's bicubic) of folders of images."),
            "degrade": ("prepare.degrade:degrade", "Make pairs with synthetic rain, blur, haze or noise."),
            "teacher-cache": (
                "tools.teacher_cache:teacher_cache",
                "Store a teacher's outputs for training images or a folder.",
            ),
        },
        "Prepare data sets.",
    ),
    "bench": (
        {
            "step": ("tools.bench:step", "Time and peak memory of a training step, part by part."),
            "scale": (
                "tools.bench_scale:scale",
                "Cost of a training step against its options, and on several processes.",
            ),
            "start": ("tools.bench_start:start", "Time from the command to the first iteration."),
            "tiles": (
                "tools.bench_tiles:tiles",
                "Time and peak memory of a large image, in tiles and whole.",
            ),
            "data": ("tools.bench_data:data", "Patches per second of the loader, against BasicSR's."),
            "validation": (
                "tools.bench_validation:validation",
                "Time of a validation beside BasicSR's own loop.",
            ),
        },
        "Measure time and memory of a training step, its settings, start and data, a large image, a validation.",
    ),
}
_WITHOUT_TORCH = ("train", "test", "new", "list", "show", "fetch")  # these register what they need themselves


_LISTS = ("evaluate",)  # commands whose repeated options also take several words: --sets Set5 Set14


class ListCommand(TyperCommand):
    """A command whose repeated options take all words up to the next option, as with argparse's ``nargs="+"``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {flag for one in self.params if getattr(one, "multiple", False) for flag in one.opts}
        words: list[str] = []
        flag = ""
        for word in args:
            if word.startswith("-"):
                flag = ""
            words += [flag, word] if flag and words[-1] != flag else [word]
            flag = word if word in lists else flag
        return super().parse_args(ctx, words)


class LazyGroup(TyperGroup):
    """A group of commands whose modules are imported when they are called, and not for the list of them."""

    commands_below: _Commands = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return [*self.commands_below]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = self.commands_below.get(cmd_name)
        return TyperCommand(cmd_name, help=found[1]) if found else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, name and _load(name, *self.commands_below[name]), rest


def _group(commands: _Commands, help_text: str) -> typer.Typer:
    cls = type("Group", (LazyGroup,), {"commands_below": commands})
    group = typer.Typer(cls=cls, help=help_text, no_args_is_help=True, add_completion=False)
    group.callback()(lambda: None)
    return group


def _load(name: str, target: Any, help_text: str) -> Any:
    if isinstance(target, dict):
        return typer.main.get_command(_group(target, help_text))
    if name not in _WITHOUT_TORCH:
        kdsr.register()
    module, function = target.split(":")
    command = typer.Typer(add_completion=False)
    passed_on = _PASS_ON if module == "cli" else None
    cls = ListCommand if name in _LISTS else TyperCommand
    command.command(name, cls=cls, context_settings=passed_on)(
        getattr(importlib.import_module(f"kdsr.{module}"), function)
    )
    return typer.main.get_command(command)


def train(context: typer.Context) -> None:
    raise typer.Exit(entry.run(True, context.args))


def test(context: typer.Context) -> None:
    raise typer.Exit(entry.run(False, context.args))


app = _group(COMMANDS, "Knowledge distillation for image restoration, inside BasicSR.")


def main() -> None:
    """Entry point of the console script."""
    try:
        code = report_errors(app)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    entry.leave(code)


if __name__ == "__main__":
    main()
