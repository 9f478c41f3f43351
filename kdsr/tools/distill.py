"""``kdsr distill``: from a teacher's checkpoint and a folder of images to a measured student, in one command."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from tqdm import tqdm

from kdsr.deploy import image_pairs, plan
from kdsr.deploy.network_file import require_device
from kdsr.deploy.student import Student, propose
from kdsr.deploy.teacher import Measured, Teacher, measure, open_teacher, restored
from kdsr.models.restorer import declared_multiple
from kdsr.runtime.atomic_files import atomic_write, display_path
from kdsr.runtime.errors import OptionError
from kdsr.tools import distill_run

OPTION_FILE = "distill.yml"


class Device(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Folders(NamedTuple):
    """The folders of images that the command names, and whether it does without ground truth."""

    images: Path | None
    gt: Path | None
    lq: Path | None
    no_gt: bool


def _say(what: str, lines: Sequence[str] | str) -> None:
    """Prints a part of the plan: its name, and lines beside it."""
    for index, line in enumerate([lines] if isinstance(lines, str) else lines):
        typer.echo(f"{what if index == 0 else '':<9} {line}")


def distill(
    teacher: Annotated[Path, typer.Argument(help="The teacher's checkpoint: .pth, .ckpt or .safetensors.")],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Photographs, from which LQ images are made; for scale 1, or with --no-gt: LQ images."
        ),
    ] = None,
    gt: Annotated[Path | None, typer.Option(help="Ground truth, beside --lq.")] = None,
    lq: Annotated[
        Path | None, typer.Option(help="LQ images; without --gt the teacher's output is learnt.")
    ] = None,
    no_gt: Annotated[bool, typer.Option("--no-gt", help="The images of --images are LQ images.")] = False,
    student: Annotated[
        str | None,
        typer.Option(
            help="A type such as SRVGGNetCompact, an option file or a checkpoint; default: the teacher's."
        ),
    ] = None,
    size: Annotated[
        str, typer.Option(help="Parameters: 10x fewer than the teacher's, or a number (54000, 300k, 1.2M).")
    ] = "10x",
    method: Annotated[str | None, typer.Option(help="A method of kdsr list; default: Logits.")] = None,
    iters: Annotated[int, typer.Option(min=1, help="Iterations of the training.")] = 3000,
    out: Annotated[Path | None, typer.Option(help="Folder; default: experiments/distill_TEACHER.")] = None,
    opt: Annotated[
        Path | None, typer.Option("--opt", "-opt", help="Option file of a teacher that is not recognised.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.auto,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only write and print the plan.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Plan anew where there is a plan; runs are kept.")
    ] = False,
) -> None:
    """Distil a teacher into a smaller student: kdsr distill TEACHER.pth --images FOLDER."""
    require_device("cpu" if device == Device.auto else device.value)
    out = out or Path("experiments") / f"distill_{teacher.stem}"
    file = out / OPTION_FILE
    given = {
        "--images": images, "--gt": gt, "--lq": lq, "--student": student, "--size": size, "--method": method,
        "--iters": iters, "--out": out, "--opt": opt, "--device": device.value,
    }  # fmt: skip
    arguments = [str(teacher), *(["--no-gt"] if no_gt else [])]
    arguments += [str(word) for flag, value in given.items() if value is not None for word in (flag, value)]
    if file.exists() and not force:
        written = plan.written_arguments(file)
        if written != shlex.join(arguments):
            raise OptionError(
                f"{display_path(file)}: was written with other arguments ({written or 'not by kdsr distill'}); "
                "take another --out, or --force to plan anew"
            )
        _say("plan", f"{display_path(file)}, as it is there")
    else:
        opened = open_teacher(teacher, opt, plan.resolve_device(device.value))
        folders = Folders(images, gt, lq, no_gt)
        _plan(opened, folders, student, size, method, iters, out, device.value, arguments)
    if dry_run:
        _say("time", distill_run.estimate(file, plan.resolve_device(device.value)))
        typer.echo(
            f"\nTrain: kdsr distill {shlex.join(arguments)}\n   or: kdsr train -opt {display_path(file)}"
        )
        return
    distill_run.train(file)
    distill_run.report(file, teacher, out, typer.echo)


def _plan(
    teacher: Teacher,
    folders: Folders,
    student: str | None,
    size: str,
    method: str | None,
    iters: int,
    out: Path,
    device: str,
    arguments: Sequence[str],
) -> None:
    """Prints the plan, and writes the images and the option file; on an error neither is left behind."""
    methods, on, scale = plan.Methods(), plan.resolve_device(device), teacher.opened.scale
    small = propose(student, size, teacher.options, teacher.parameters, scale)
    sizes = plan.sizes(on, scale, max(teacher.opened.multiple_of, declared_multiple(small.net)))
    found = image_pairs.find(
        folders.images, folders.gt, folders.lq, no_gt=folders.no_gt, scale=scale, patch=sizes.patch
    )
    chosen = methods.choose(method, found.has_gt)
    measured = measure(teacher, image_pairs.samples(found))
    if measured.teacher.options != teacher.options:
        small = propose(student, size, measured.teacher.options, teacher.parameters, scale)
    file = out / OPTION_FILE
    text, taps = plan.option_file(
        methods, chosen, measured.teacher, small, found,
        out=out, file=file, iters=iters, device=device, size=sizes, arguments=arguments,
    )  # fmt: skip
    _print_networks(measured, small)
    _print_images(found, sizes)
    others = methods.others(chosen, found, small.net, teacher.opened.net)
    _say("method", f"{chosen}; --method also has {', '.join(others)}")
    for option, pairs in taps.items():
        _say("", f"{option}: {', '.join(' → '.join((pair['teacher'], pair['student'])) for pair in pairs)}")
    _say("training", f"{iters} iterations of {sizes.batch} patches of {sizes.patch}×{sizes.patch} on {on}")
    number = len(found.train) + len(found.val) if found.made else 0
    bar = tqdm(total=number, unit="image", desc="images", disable=None if number else True, leave=False)
    with _nothing_left(out, file):
        with bar:
            net = measured.teacher.opened.net
            image_pairs.write(found, out / "data", lambda image: restored(net, image, scale), bar.update)
        atomic_write(file, lambda stream: stream.write(text.encode()))
        distill_run.check(file)
    _say("options", display_path(file))


def _print_networks(measured: Measured, student: Student) -> None:
    teacher = measured.teacher
    opened = teacher.opened
    sides = f"sides padded to multiples of {opened.multiple_of}" if opened.multiple_of > 1 else "any size"
    _say("teacher", [f"{opened.source}; {teacher.parameters:,} parameters, RGB, {sides}", *measured.lines])
    if measured.psnr < measured.baseline and measured.has_gt:
        than = "the bicubic images" if opened.scale > 1 else "the input"
        _say(
            "",
            f"Warning: that is worse than {than}, and a student learns what its teacher does. Is it the right",
        )
        _say("", "file, are these images like those that it was trained on? (A GAN may be worse on purpose.)")
    ratio = teacher.parameters / student.parameters
    _say("student", f"{student.how}; {student.parameters:,} parameters, {ratio:.1f} times fewer")
    arguments = student.options.get("parameters") or student.options
    _say("", ", ".join(f"{key} {value}" for key, value in arguments.items() if key != "type"))


def _print_images(found: image_pairs.Images, sizes: plan.Sizes) -> None:
    what = (
        "pairs" if found.has_gt else "no ground truth: the teacher's output is learnt, and measured against"
    )
    what = f"LQ made with Matlab's bicubic, 1/{found.scale}" if found.made else what
    held_out = ", ".join(pair.file.name for pair in found.val[:3]) + (", …" if len(found.val) > 3 else "")
    lines = [
        f"{len(found.train)} to train on, {len(found.val)} held out ({held_out}); {what}",
        "held out by file: the same photograph in another size or format is not noticed",
    ]
    if found.left_out:
        names = ", ".join(file.name for file in found.left_out[:3]) + (
            ", …" if len(found.left_out) > 3 else ""
        )
        lines.append(f"{len(found.left_out)} left out, smaller than a patch of {sizes.patch} ({names})")
    _say("images", lines)


@contextmanager
def _nothing_left(out: Path, file: Path) -> Iterator[None]:
    """Removes the images and the option file that the block has written if it fails, and folders that it has made."""
    before = {path for path in (out / "data", file) if path.exists()}
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        if out / "data" not in before:
            shutil.rmtree(out / "data", ignore_errors=True)
        if file not in before:
            file.unlink(missing_ok=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
