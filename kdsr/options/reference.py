"""Creates docs/option_reference.md from the declarations of the options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY

from kdsr.data.dataset_options import STOCK_DATASETS, StageOptions
from kdsr.data.image_folder_dataset import ImageFolderDataset
from kdsr.data.lq_image_dataset import LQImageDataset
from kdsr.data.restormer_dataset import Dataset_GaussianDenoising
from kdsr.distill.term import all_terms
from kdsr.models.kd_model import KDModel
from kdsr.models.sections import LoggerOptions, NetworkPathOptions, PathOptions, ValOptions
from kdsr.models.trainer import LoopInterface
from kdsr.models.vqgan_model import VQGANModel
from kdsr.options.json_schema import known, known_models
from kdsr.options.signatures import options_of
from kdsr.options.stock import SCHEDULERS, STOCK_METRICS
from kdsr.runtime.declarations import NONE, Option
from kdsr.runtime.distributed import DistOptions
from kdsr.runtime.precision import PrecisionOptions

_HEAD = """# Option reference

Every key of an option file, its default and its valid values. `kdsr schema` writes this page from declarations in the
code; do not edit it. How files are composed, and more on some options, is in [options.md](options.md).

"–" as a default: the key is required, or has no effect if it is missing. Unknown keys and values out of range are
errors.
"""
_WORDS = {bool: "true or false", str: "text", list: "list", dict: "section", NONE: "null"}


def values_of(option: Option) -> str:
    """Describes the valid values of an option."""
    words = []
    for kind in option.kinds:
        if kind is dict and option.losses:
            words += [f"`{each.__name__}`" for each in option.losses]
        elif kind is str and option.choices:
            words += [f"`{choice}`" for choice in option.choices]
        elif kind is list and option.item is not None:
            words.append(f"list of {values_of(option.item)}")
        elif kind is not int or float not in option.kinds:
            words.append(_number(option, kind) if kind in (int, float) else _WORDS[kind])
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _number(option: Option, kind: type) -> str:
    bounds = (
        ("from", option.lowest),
        ("above", option.above),
        ("to", option.highest),
        ("below", option.below),
    )
    limits = [f"{word} {bound:,}" for word, bound in bounds if math.isfinite(bound)]
    return " ".join(["whole number" if kind is int else "number", *limits])


def default_of(option: Option) -> str:
    """Returns the default of an option as YAML."""
    if option.shown_default is not None:
        return option.shown_default
    if option.required or (option.default is None and NONE not in option.kinds):
        return "–"
    text = yaml.safe_dump(option.default, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def flat(declared: Mapping[str, Option], place: str = "") -> Iterable[tuple[str, Option]]:
    """Yields the options of a section and of its subsections with their dotted names."""
    for key, option in declared.items():
        if option.section is not None and dict in option.kinds:
            yield from flat(option.section.declared(), f"{place}{key}.")
        else:
            yield place + key, option


def _table(declared: Mapping[str, Option], more: Mapping[str, str] | None = None, title: str = "") -> str:
    columns = ["key", "default", "values", *([title] if more else []), "meaning"]
    rows = [columns, ["---"] * len(columns)]
    for key, option in flat(declared):
        extra = [more.get(key.split(".")[0], "")] if more else []
        rows.append([f"`{key}`", default_of(option), values_of(option), *extra, option.help])
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows) + "\n"


def _arguments(registry: Any) -> list[str]:
    return [
        f"#### {name}\n\n{(inspect.getdoc(entry) or '').split(chr(10) * 2)[0]}\n\n{_table(options)}"
        for name, entry in known(registry).items()
        if entry.__module__.startswith("kdsr.") and (options := options_of(entry))
    ]


def reference() -> str:
    """Returns the page as Markdown."""
    top: dict[str, Option] = {}
    for keys in known_models().values():
        top |= keys.top
    networks = ", ".join(f"`{key.removeprefix('network_')}`" for key in top if key.startswith("network_"))
    path = PathOptions.declared() | {f"{key}_X": each for key, each in NetworkPathOptions.declared().items()}
    datasets: dict[str, Option] = {}
    of: dict[str, list[str]] = {}
    kinds = STOCK_DATASETS | {
        each.__name__: each.options
        for each in (ImageFolderDataset, LQImageDataset, Dataset_GaussianDenoising)
    }
    for name, kind in kinds.items():
        declared = kind.declared()
        datasets = declared | datasets
        for key in declared:
            of.setdefault(key, []).append(name)
    sets = {
        key: "" if len(names) == len(kinds) else ", ".join(f"`{name}`" for name in names)
        for key, names in of.items()
    }
    shared = LoopInterface.train_options.declared()
    terms = {key: each for key, each in KDModel.train_options.declared().items() if key not in shared}
    readers: dict[str, list[str]] = {}
    for key, term in all_terms().items():
        terms |= term.options.declared()
        for option in term.options.declared().keys() - {key}:
            readers.setdefault(option, []).append(f"`{key}`")
    with_terms = {key: ", ".join(names) for key, names in readers.items()}
    vqgan = {key: each for key, each in VQGANModel.train_options.declared().items() if key not in shared}
    with_gan = {key: f"`{each.read_with}`" for key, each in vqgan.items() if each.read_with}
    parts = [
        _HEAD,
        "## Top level\n",
        _table(top),
        "## datasets\n",
        "One section per set: `train`, and `val` or `val_NAME` in training; `test_NAME` or `val_NAME` in a test. The "
        "keys of BasicSR's other types are not checked.\n",
        _table(datasets, sets, "only of"),
        "A stage of `progressive`:\n",
        _table(StageOptions.declared()),
        "## path\n",
        f"X is one of {networks}.\n",
        _table(path),
        "## train\n",
        "Every model of kdsr:\n",
        _table(shared),
        "`KDModel` and its presets:\n",
        _table(terms, with_terms, "read with"),
        "`VQGANModel`:\n",
        _table(vqgan, with_gan, "read with"),
        *(f"`scheduler: {{type: {name}}}`:\n\n{_table(each.declared())}" for name, each in SCHEDULERS.items()
          if name != "MultiStepRestartLR"),
        "## val\n",
        _table(ValOptions.declared()),
        *(f"`{name}`:\n\n{_table(each.declared())}" for name, each in STOCK_METRICS.items()),
        "## precision\n",
        _table(PrecisionOptions.declared()),
        "## logger\n",
        _table(LoggerOptions.declared()),
        "## dist_params\n",
        _table(DistOptions.declared()),
        "## Networks\n",
        "The arguments of kdsr's own; those of BasicSR's networks are the arguments of their constructors.\n",
        *_arguments(ARCH_REGISTRY),
        "## Losses\n",
        "In place of a number a `loss_weight` may be [a schedule](methods.md#weights-that-change-during-a-run).\n",
        *_arguments(LOSS_REGISTRY),
    ]  # fmt: skip
    return "\n".join(parts)
