"""Imports the user's modules in ``import_modules`` before the option check.

Importing a module runs its code. No other option runs code.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import keyword
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from os import path as osp
from pathlib import Path
from typing import Any

from basicsr.utils import registry as registries
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
)

from kdsr.distill.term import TERM_REGISTRY
from kdsr.runtime.declarations import describe
from kdsr.runtime.errors import OptionError

MODULES_KEY, FOLDERS_KEY = "import_modules", "import_path"
_REGISTRIES: dict[str, Any] = {
    "a network": ARCH_REGISTRY,
    "a loss": LOSS_REGISTRY,
    "a term": TERM_REGISTRY,
    "a data set": DATASET_REGISTRY,
    "a metric": METRIC_REGISTRY,
    "a model": MODEL_REGISTRY,
}
_registering: set[str] = set()  # modules that registered an entry when imported


def import_user_modules(opt: dict[str, Any], file: str | Path, warnings: list[str]) -> None:
    """Imports the modules in ``import_modules``; a module that is already imported is not reloaded.

    A module is searched for in the folders of ``import_path``, the working directory, the option file's folder, and
    Python's own path. The folder in which it is found is appended to ``sys.path``, for the loader's workers. If it is
    the folder of the option file, it is also added to ``import_path``, so that the resolved options are self-contained.

    Args:
        opt: The options, before they are checked.
        file: The option file.
        warnings: Receives modules that register nothing.

    Raises:
        OptionError: All modules that are missing, ambiguous, or cannot be imported.
    """
    problems: list[str] = []
    names = _texts(opt, MODULES_KEY, "module names", problems)
    given = _texts(opt, FOLDERS_KEY, "folders", problems)
    own = [osp.abspath(osp.expanduser(folder)) for folder in given]
    for index, folder in enumerate(own):
        if not osp.isdir(folder):
            problems.append(f"{FOLDERS_KEY}.{index}: no such folder: {given[index]}")
    beside = osp.dirname(osp.expanduser(str(file)))
    importlib.invalidate_caches()  # a file may be newer than Python's cache
    places = list(dict.fromkeys([*own, os.getcwd(), osp.abspath(beside)]))
    for index, name in enumerate(names):
        place = f"{MODULES_KEY}.{index}"
        problem = _name_problem(name)
        found = None if problem else _first(name, places)
        problem = problem or _place_problem(name, found, places) or _imported(name, found)
        if problem:
            problems.append(f"{place}: {problem}")
            continue
        if not _registers(name):
            warnings.append(
                f"{place}: {name} registers nothing: no network, loss, term, data set, metric or model. Is a line such "
                "as @ARCH_REGISTRY.register() missing?"
            )
        if found and found[0] not in own and found[0] != os.getcwd():
            given, own = [*given, beside], [*own, found[0]]
            opt[FOLDERS_KEY] = given
    if problems:
        raise OptionError(problems)


def _texts(opt: dict[str, Any], key: str, what: str, problems: list[str]) -> list[str]:
    value = opt.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if all(isinstance(entry, str) and entry for entry in values):
        return values
    problems.append(f"{key}: expected a list of {what}, got {describe(value)}")
    return []


def module_fingerprints(opt: dict[str, Any]) -> dict[str, str]:
    """Returns the SHA-256 of each imported module's code by name; of a package, of all its files."""
    found = {}
    for name in _texts(opt, MODULES_KEY, "module names", []):
        file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
        code = b"".join(each.read_bytes() for each in files if each.is_file())
        found[name] = hashlib.sha256(code).hexdigest()
    return found


# ------------------------------------------------------------------------------------------------------ searching


def _name_problem(name: str) -> str | None:
    if "/" in name or os.sep in name or name.endswith(".py"):
        file = Path(name).with_suffix("")
        below = all(part.isidentifier() for part in file.parts)
        written = ".".join(file.parts) if below else f"{file.name}, and {FOLDERS_KEY}: [{file.parent}]"
        return f"{name} is a file; give the module's name instead: {written}"
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split(".")):
        return f"{name!r} is not the name of a module; use letters, digits and _, with dots between packages"
    return None


def _specs(name: str, folder: str | None) -> list[ModuleSpec]:
    """Returns the import specs of the parts of a dotted name, up to the first part that is missing. Imports nothing.

    Args:
        name: The module.
        folder: The folder to search; None: Python's path.
    """
    parts = name.split(".")
    try:
        top = (
            importlib.util.find_spec(parts[0]) if folder is None else PathFinder.find_spec(parts[0], [folder])
        )
    except ValueError:  # a module without a spec, such as __main__
        return []
    specs = [] if top is None else [top]
    while specs and len(specs) < len(parts):
        below = specs[-1].submodule_search_locations
        spec = None if below is None else PathFinder.find_spec(parts[len(specs)], list(below))
        if spec is None:
            break
        specs.append(spec)
    return specs


def _file(name: str, specs: Sequence[ModuleSpec]) -> str | None:
    """Returns the file of the module; None if it was not found or is a folder without an ``__init__.py``."""
    return specs[-1].origin if len(specs) == len(name.split(".")) else None


def _first(name: str, places: Iterable[str]) -> tuple[str, str] | None:
    """Returns the first folder with the module, and the module's file."""
    found = ((folder, _file(name, _specs(name, folder))) for folder in places)
    return next(((folder, file) for folder, file in found if file), None)


def _place_problem(name: str, found: tuple[str, str] | None, places: Sequence[str]) -> str | None:
    """Returns why a module is missing or ambiguous, or None."""
    by_itself = _specs(name, None)
    other = _file(name, by_itself)
    if found is None:
        if other:
            return None
        for folder in places:
            below = osp.join(folder, *name.split("."))
            if osp.isdir(below):
                return f"{below} is a folder without an __init__.py; give a module in it, {name}.NAME"
        near = difflib.get_close_matches(
            name, [file.stem for folder in places for file in Path(folder).glob("*.py")], 1
        )
        return f"no module {name} in {', '.join(places)} or Python's path. " + (
            f"Did you mean {near[0]}?"
            if near
            else f"Put it into one of these folders, or add its folder to {FOLDERS_KEY}"
        )
    folder, file = found
    mine = _specs(name, folder)
    above = by_itself[0].origin if by_itself else None
    if above and not _same(above, mine[0].origin or ""):
        other = other or above  # a package elsewhere hides the one with the module
    if other and not _same(other, file):
        return f"{file} is hidden by {other}, which has the same name; rename yours"
    return None


def _same(one: str, other: str) -> bool:
    return osp.realpath(one) == osp.realpath(other)


# ------------------------------------------------------------------------------------------------------- importing


def _imported(name: str, found: tuple[str, str] | None) -> str | None:
    """Imports a module; returns the reason if that fails, and restores the registries."""
    if name in sys.modules:
        return None
    if found and found[0] not in sys.path:
        sys.path.append(found[0])
    before = {what: dict(iter(registry)) for what, registry in _REGISTRIES.items()}
    there = set(sys.modules)
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        reason = _why(name, error, found)
        _roll_back(before, there)
        return reason
    if any(dict(iter(registry)).keys() > before[what].keys() for what, registry in _REGISTRIES.items()):
        _registering.add(name)
    return None


def _registers(name: str) -> bool:
    made_by = {
        str(getattr(made, "__module__", "")) for registry in _REGISTRIES.values() for _, made in registry
    }
    return name in _registering or any(f"{module}.".startswith(f"{name}.") for module in made_by)


def _roll_back(before: dict[str, dict[str, Any]], there: set[str]) -> None:
    """Removes new registry entries and the modules that added them, so that a new import registers them again."""
    for what, registry in _REGISTRIES.items():
        for entry in [key for key, _ in registry if key not in before[what]]:
            module = getattr(registry._obj_map.pop(entry), "__module__", "")
            if module not in there:
                sys.modules.pop(module, None)


def _why(name: str, error: BaseException, found: tuple[str, str] | None) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and not _same(frame.filename, __file__)
    ]
    if found:  # the last line in the user's code is more useful than one in a library
        own = [frame for frame in frames if frame.filename.startswith(found[0] + os.sep)]
        frames = [frame for frame in own if "site-packages" not in frame.filename] or frames
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}, line {error.lineno}"
    taken = _already_registered(error)
    if taken:
        kind, entry, by = taken
        return (
            f"{name} cannot be imported: it registers {kind} {entry} ({where}), but {by} has registered one of "
            f"this name; rename yours"
        )
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    message = (text.strip().splitlines() or [""])[0]
    message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"{name} cannot be imported: {message}" + (f" ({where})" if where else "")


def _already_registered(error: BaseException) -> tuple[str, str, str] | None:
    """Returns kind, name and registering module of a duplicate refused by BasicSR's registry, or None."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None or not isinstance(error, AssertionError):
        return None
    code, values = step.tb_frame.f_code, step.tb_frame.f_locals
    if not _same(code.co_filename, registries.__file__ or "") or "name" not in values:
        return None
    entry, refusing = values["name"], values.get("self")
    kind = next((kind for kind, registry in _REGISTRIES.items() if registry is refusing), None)
    if kind is None:
        return None
    return kind, entry, str(getattr(_REGISTRIES[kind]._obj_map.get(entry), "__module__", "somewhere"))
