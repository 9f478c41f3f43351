"""``kdsr list``: tables of methods, tasks and backbones, and of registered names.

It can write them into the README. Sources are the pieces, the option files, and the names and papers below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import kdsr
from kdsr.options.compose import Choice, Pieces
from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.errors import OptionError
from kdsr.tools.recipes import recipe_table

BEGIN = "<!-- kdsr list: what follows is written by `make tables` -->"
END = "<!-- kdsr list: end -->"

# piece in _base_/methods -> method, paper
METHODS: dict[str, tuple[str, str]] = {
    "DCKD": ("DCKD", "Zhou et al., [AAAI 2025](https://arxiv.org/abs/2412.08939)"),
    "DCKD_release": ("DCKD, as its authors released it", "the same"),
    "DCKDstar": ("DCKD\\* (DCKD + DUKD)", "the same, and DUKD's"),
    "SLKD": ("SLKD", "Zhang and Yan, [ICASSP 2025](https://arxiv.org/abs/2501.09268)"),
    "FACD": ("FACD", "Moon et al., [IEEE Access 2023](https://arxiv.org/abs/2211.15951)"),
    "MiPKD": ("MiPKD", "Li et al., [ICLR 2025](https://arxiv.org/abs/2404.02573)"),
    "MCLIR": ("MCLIR (no teacher)", "Wu et al., [AAAI 2024](https://arxiv.org/abs/2309.06023)"),
    "DUKD": ("DUKD", "Zhang et al., [2023](https://arxiv.org/abs/2309.14162)"),
    "MTKD": ("MTKD, its wavelet loss", "Jiang et al., [ECCV 2024](https://arxiv.org/abs/2404.09571)"),
    "CSD": ("CSD", "Wang et al., [IJCAI 2021](https://arxiv.org/abs/2105.11683)"),
    "FAKD": ("FAKD", "He et al., [ICIP 2020](https://doi.org/10.1109/ICIP40778.2020.9190917)"),
    "RKD": ("RKD", "Park et al., [CVPR 2019](https://arxiv.org/abs/1904.05068)"),
    "AT": ("AT", "Zagoruyko and Komodakis, [ICLR 2017](https://arxiv.org/abs/1612.03928)"),
    "FitNet": ("FitNet", "Romero et al., [ICLR 2015](https://arxiv.org/abs/1412.6550)"),
    "Logits": ("Logits KD", "Hinton et al., [2015](https://arxiv.org/abs/1503.02531)"),
    "Logits_no_gt": ("Logits KD without ground truth", "–"),
    "Scratch": ("Scratch (no teacher)", "–"),
}
# data set -> task
TASKS = {
    "DIV2K": "super-resolution, ×2, ×3, ×4 (DIV2K)",
    "DIV2K_LQ": "super-resolution, ×2, ×3, ×4 (DIV2K)",
    "GoPro": "motion deblurring (GoPro)",
    "Rain13K": "deraining (Rain13K)",
    "RESIDE": "dehazing (RESIDE)",
    "noise25": "denoising, σ = 25 (DIV2K)",
}


def tables(options: Path) -> str:
    """Returns three Markdown tables: methods and losses, methods and tasks, registered names.

    ``options`` is the folder with ``_base_`` and ``train``. A backbone is bold if ``train`` has a file for it.

    Raises:
        OptionError: A method is not in ``METHODS``, or there is no method.
    """
    pieces = Pieces(options)
    where = f"{options}/_base_/methods"
    if not pieces.methods:
        raise OptionError(f"{where}: no methods found; give a folder such as options")
    if unknown := [name for name in pieces.methods if name not in METHODS]:
        raise OptionError([f"{where}/{name}.yml: not in METHODS of kdsr/tools/tables.py" for name in unknown])
    first, second = [], []
    shipped = {file.stem for file in (options / "train").glob("*.yml")}
    choices = [one for one in pieces.choices() if one.data in TASKS and not one.backbone.endswith("_demo")]
    tasks = list(dict.fromkeys(TASKS.values()))
    for method, (name, paper) in METHODS.items():
        if method not in pieces.methods:
            continue
        piece = pieces.read(pieces.methods[method])
        losses = [key for key, value in piece["train"].items() if key.endswith("_opt") and value]
        first.append([name, f"`{method}`", paper, f"`{piece['model_type']}`", _code(losses)])
        ours = [one for one in choices if one.method == method]
        second.append(
            [name, *(_backbones([c for c in ours if TASKS[c.data] == task], shipped) for task in tasks)]
        )
    return "\n".join(
        (
            _table(["method", "`--method`", "paper", "`model_type`", "losses in `train`"], first),
            _table(["backbones", *tasks], second),
            _table(["registered", "by kdsr, in addition to BasicSR"], _registered()),
        )
    )


def _backbones(choices: Iterable[Choice], shipped: set[str]) -> str:
    """Formats backbones, ``**EDSR**, RLFN (×4)``: bold with an option file, factors unless all three."""
    scales: dict[str, set[int]] = {}
    bold = set()
    for one in choices:
        scales.setdefault(one.backbone, set()).add(one.scale or 1)
        bold |= {one.backbone} if one.name in shipped else set()
    shown = []
    for backbone, its in sorted(scales.items()):
        factors = "" if its in ({1}, {2, 3, 4}) else f" ({', '.join(f'×{scale}' for scale in sorted(its))})"
        shown.append((f"**{backbone}**" if backbone in bold else backbone) + factors)
    return ", ".join(shown) or "–"


def _registered() -> list[list[str]]:
    kdsr.register()  # imports torch, which the help does not need
    from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY

    from kdsr.distill.term import all_terms

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
    """Replaces the tables of a Markdown text.

    Raises:
        OptionError: The markers do not occur exactly once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise OptionError(
            f"{name}: markers of the tables are missing or duplicate; it needs these two lines once:\n{BEGIN}\n{END}"
        )
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{between}\n{END}{text.partition(END)[2]}"


def list_templates(
    options: Annotated[Path, typer.Argument(help="Folder with _base_ and train.")] = Path("options"),
    into: Annotated[
        Path | None, typer.Option(help="Write the tables into this Markdown file, between its markers.")
    ] = None,
    recipes: Annotated[
        bool,
        typer.Option("--recipes", help="Optimizer, schedule, batch and weights of each template instead."),
    ] = False,
) -> None:
    """List methods with their losses, backbones and tasks, and registered names, as Markdown tables."""
    made = recipe_table(options) if recipes else tables(options)
    if into is None:
        typer.echo(made, nl=False)
        return
    content = replaced(into.read_text(encoding="utf-8"), made, str(into))
    atomic_write(into, lambda file: file.write(content.encode()))
