"""Finds misspelt keys before torch and BasicSR are imported, which takes seconds.

The names of the options are read from the package's source: the fields of the subclasses of ``Options``. A file with
``import_modules`` is not checked here, because the modules may declare further options.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kdsr.options.command_line import read_arguments
from kdsr.options.files import load
from kdsr.runtime.suggestions import nearest

# base class of a section's declarations -> section
_SECTIONS = {
    "TopOptions": "",
    "StockPathOptions": "path",
    "StockValOptions": "val",
    "StockLoggerOptions": "logger",
    "DistOptions": "dist_params",
    "PrecisionOptions": "precision",
    "DatasetOptions": "datasets",
    "LoopOptions": "train",
}
_PER_NETWORK = "NetworkPathOptions"  # pretrain_network_g and so on


def misspelt(argv: Sequence[str] | None, is_train: bool) -> list[str]:
    """Returns the misspelt keys of the option file on a command line; empty if they cannot be found without imports.

    Args:
        argv: The arguments; those of the process by default.
        is_train: Training, or testing.

    Raises:
        OptionError: The option file cannot be read.
        SystemExit: With exit code 2, if a flag is unknown or the option file is missing.
    """
    args = read_arguments(is_train, argv)
    if os.path.isdir(os.path.expanduser(args.opt)):
        return []
    opt = load(args.opt, args.force_yml)
    names, known = _declared()
    if opt.get("import_modules") or str(opt.get("model_type")) not in known:
        return []
    found = []
    for place, section in _sections(opt, known):
        kind = place.split(".")[0]
        valid = names.get(kind, names["train"])
        networks = [key for key in opt if key.startswith("network_")] if kind in ("", "path") else []
        if kind == "path":
            networks = [
                f"{name}_{key.removeprefix('network_')}" for key in networks for name in names[_PER_NETWORK]
            ]
        beginnings = ("network_",) if kind == "" else tuple(f"{name}_" for name in names[_PER_NETWORK])
        for key in section:
            if key not in valid and not (kind in ("", "path") and key.startswith(beginnings)):
                here = f"{place}.{key}" if place else key
                found.append(f"{here}: unknown key; {nearest(key, {*valid, *networks})}")
    return found


def _sections(opt: dict[str, Any], known: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the sections of the options that have declarations, with their names."""
    yield "", opt
    for section in _SECTIONS.values():
        below = opt.get(section)
        if section not in ("", "datasets") and isinstance(below, dict):
            yield section, below
    datasets = opt.get("datasets")
    for key, dataset in datasets.items() if isinstance(datasets, dict) else ():
        if isinstance(dataset, dict) and str(dataset.get("type")) in known:
            yield f"datasets.{key}", dataset


@cache
def _declared() -> tuple[dict[str, set[str]], set[str]]:
    """Returns the names of declared options by section, and the names of the classes that declare them."""
    bases: dict[str, list[str]] = {}
    fields: dict[str, set[str]] = {}
    known: set[str] = set()
    of_terms: set[str] = set()  # their options are those of train
    for file in Path(__file__).resolve().parents[1].rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "Options)" not in text and "Model)" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
                lines = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
                fields[node.name] = {target.id for target in lines if isinstance(target, ast.Name)}
                for each in node.body:
                    if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "options":
                        of_terms.add(ast.unparse(each.value))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):  # STOCK_MODELS, ...
                known |= {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}

    def ancestors(name: str) -> list[str]:
        return [name, *(above for base in bases.get(name, ()) for above in ancestors(base))]

    names: dict[str, set[str]] = {_PER_NETWORK: fields[_PER_NETWORK]}
    for name in fields:
        above = ancestors(name)
        section = next((_SECTIONS[base] for base in above if base in _SECTIONS), None)
        if section is None and name in of_terms:
            section = "train"
        if section is not None:
            names.setdefault(section, set()).update(*(fields.get(base, ()) for base in above))
    names[""].add("precision")
    return names, known | set(bases)
