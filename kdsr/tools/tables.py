"""``kdsr list``: which methods have option files for which tasks and backbones, and what is registered.

The README's tables are made by this. Nothing in them is written by hand but what stands below: the names of methods and
tasks, and the papers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY

from kdsr.distill.term import all_terms
from kdsr.options.files import load
from kdsr.runtime.atomic_files import write_whole
from kdsr.runtime.errors import OptionError

BEGIN = "<!-- kdsr list: what follows is written by `make tables` -->"
END = "<!-- kdsr list: end -->"

# beginning of a template's name, and its variant -> method, paper
METHODS: dict[tuple[str, str], tuple[str, str]] = {
    ("DCKD", ""): ("DCKD", "Zhou et al., [AAAI 2025](https://arxiv.org/abs/2412.08939)"),
    ("DCKD", "release"): ("DCKD, as its authors released it", "the same"),
    ("DCKDstar", ""): ("DCKD\\* (DCKD + DUKD)", "the same, and DUKD's"),
    ("SLKD", ""): ("SLKD", "Zhang and Yan, [ICASSP 2025](https://arxiv.org/abs/2501.09268)"),
    ("FACD", ""): ("FACD", "Moon et al., [IEEE Access 2023](https://arxiv.org/abs/2211.15951)"),
    ("MiPKD", ""): ("MiPKD", "Li et al., [ICLR 2025](https://arxiv.org/abs/2404.02573)"),
    ("MCLIR", ""): ("MCLIR (no teacher)", "Wu et al., [AAAI 2024](https://arxiv.org/abs/2309.06023)"),
    ("DUKD", ""): ("DUKD", "Zhang et al., [2023](https://arxiv.org/abs/2309.14162)"),
    ("CSD", ""): ("CSD", "Wang et al., [IJCAI 2021](https://arxiv.org/abs/2105.11683)"),
    ("FAKD", ""): ("FAKD", "He et al., [ICIP 2020](https://doi.org/10.1109/ICIP40778.2020.9190917)"),
    ("RKD", ""): ("RKD", "Park et al., [CVPR 2019](https://arxiv.org/abs/1904.05068)"),
    ("AT", ""): ("AT", "Zagoruyko and Komodakis, [ICLR 2017](https://arxiv.org/abs/1612.03928)"),
    ("FitNet", ""): ("FitNet", "Romero et al., [ICLR 2015](https://arxiv.org/abs/1412.6550)"),
    ("Logits", ""): ("Logits KD", "Hinton et al., [2015](https://arxiv.org/abs/1503.02531)"),
    ("Logits", "no_gt"): ("Logits KD without ground truth", "–"),
    ("Scratch", ""): ("Scratch (no teacher)", "–"),
}
# beginnings of the templates that compare no methods: demos, short runs, networks that others need
_OTHERS = ("demo", "short", "teacher", "TeacherB", "VQGAN")
# name of the training set -> task, for networks that keep the size
TASKS = {
    "GoPro": "motion deblurring (GoPro)",
    "Rain13K": "deraining (Rain13K)",
    "RESIDE_indoor": "dehazing (RESIDE)",
    "DIV2K_noise25": "denoising, σ = 25 (DIV2K)",
}
SUPER_RESOLUTION = "super-resolution (DIV2K)"


@dataclass(frozen=True)
class Template:
    """What a template of a method is for: the student's type, the upscaling factor, the losses that are on."""

    method: tuple[str, str]
    task: str
    backbone: str
    scale: int
    model_type: str
    losses: tuple[str, ...]


def read_templates(folder: Path) -> list[Template]:
    """The templates of methods, ``METHOD_BACKBONE_TASK[_VARIANT].yml``, by file name.

    Raises:
        OptionError: There is none; or one belongs to a method or a task that has no name here.
    """
    read, problems = [], []
    for file in sorted(folder.glob("*.yml")):
        prefix, _, rest = file.stem.partition("_")
        if prefix in _OTHERS:
            continue
        method = (prefix, "_".join(rest.split("_")[2:]))
        options = load(file)
        name, scale = options["datasets"]["train"]["name"], options.get("scale") or 1
        if method not in METHODS:
            shown = f"{prefix}, {method[1]}" if method[1] else prefix
            problems.append(f"{file}: {shown} is no method that METHODS of kdsr/tools/tables.py names")
        elif scale == 1 and name not in TASKS:
            problems.append(f"{file}: {name} is no training set that TASKS of kdsr/tools/tables.py names")
        else:
            task = TASKS[name] if scale == 1 else SUPER_RESOLUTION
            losses = tuple(key for key, value in options["train"].items() if key.endswith("_opt") and value)
            network = options["network_g"]["type"].removesuffix("Local")  # NAFNet as it is tested
            read.append(Template(method, task, network, scale, options["model_type"], losses))
    if problems:
        raise OptionError(problems)
    if not read:
        raise OptionError(
            f"{folder}: there are no option files of methods; name a folder such as options/train"
        )
    return read


def tables(folder: Path) -> str:
    """Three Markdown tables: methods and their losses, methods by tasks, and what kdsr registers."""
    templates = read_templates(folder)
    methods = {
        method: ours for method in METHODS if (ours := [one for one in templates if one.method == method])
    }
    tasks = [
        task for task in (SUPER_RESOLUTION, *TASKS.values()) if any(one.task == task for one in templates)
    ]
    first = [
        [
            *METHODS[method],
            _code(dict.fromkeys(one.model_type for one in ours)),
            _code(dict.fromkeys(loss for one in ours for loss in one.losses)),
            f"`{folder.as_posix()}/{method[0]}_*{'_' + method[1] if method[1] else ''}.yml`",
        ]
        for method, ours in methods.items()
    ]
    second = [
        [METHODS[method][0], *(_backbones([one for one in ours if one.task == task]) for task in tasks)]
        for method, ours in methods.items()
    ]
    return "\n".join(
        (
            _table(["method", "paper", "`model_type`", "losses in `train`", "templates"], first),
            _table(["backbones", *tasks], second),
            _table(["registered", "by kdsr, beside BasicSR's own"], _registered()),
        )
    )


def _backbones(templates: Iterable[Template]) -> str:
    """``EDSR, RCAN (×2, ×3, ×4); RLFN (×4)``; without factors where the size stays."""
    scales: dict[str, set[int]] = {}
    for one in templates:
        scales.setdefault(one.backbone, set()).add(one.scale)
    alike: dict[tuple[int, ...], list[str]] = {}
    for backbone, its in sorted(scales.items()):
        alike.setdefault(tuple(sorted(its)), []).append(backbone)
    parts = []
    for factors, backbones in sorted(alike.items(), key=lambda entry: (-len(entry[0]), entry[0])):
        shown = "" if factors == (1,) else f" ({', '.join(f'×{scale}' for scale in factors)})"
        parts.append(", ".join(backbones) + shown)
    return "; ".join(parts) or "–"


def _registered() -> list[list[str]]:
    def ours(registry: Any) -> list[str]:
        return sorted(name for name, made in registry if made.__module__.startswith("kdsr."))

    return [
        ["models", _code(ours(MODEL_REGISTRY))],
        ["terms of `KDModel` and its presets", _code(all_terms())],
        ["losses", _code(ours(LOSS_REGISTRY))],
        ["networks", _code(ours(ARCH_REGISTRY))],
        ["data sets", _code(ours(DATASET_REGISTRY))],
    ]


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |\n" for line in (header, *rows)]
    return "".join((lines[0], "|", "---|" * len(header), "\n", *lines[1:]))


def replaced(text: str, between: str, name: str) -> str:
    """A Markdown text with new tables between its markers.

    Raises:
        OptionError: The markers are not there, once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise OptionError(f"{name}: has no place for the tables; give it these two lines:\n{BEGIN}\n{END}")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{between}\n{END}{text.partition(END)[2]}"


def list_templates(
    templates: Annotated[Path, typer.Argument(help="Folder of option files.")] = Path("options/train"),
    into: Annotated[
        Path | None, typer.Option(help="Write the tables into this Markdown file, between its markers.")
    ] = None,
) -> None:
    """Methods, tasks and backbones that have option files, and what is registered, as Markdown tables."""
    made = tables(templates)
    if into is None:
        typer.echo(made, nl=False)
        return
    content = replaced(into.read_text(encoding="utf-8"), made, str(into))
    write_whole(into, lambda file: file.write(content.encode()))
