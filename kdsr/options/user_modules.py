"""``import_modules``: the user's own modules, imported before the options that name what is in them are checked.

Importing a module runs its code. Nothing else in an option file does, and nothing is imported that the file does not
name.
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
_registering: set[str] = set()  # modules that registered something when they were imported


def import_user_modules(opt: dict[str, Any], file: str | Path, warnings: list[str]) -> None:
    """Imports what ``import_modules`` names; a module that this process has imported already stays as it is.

    Each is looked for in the folders of ``import_path``, in the working directory, in the folder of the option file,
    and then where Python finds modules by itself. The folder in which one is found is added at the end of
    ``sys.path`` and stays there: workers of loaders, which import the module again, get a copy of it. What lies in
    the option file's folder is noted in ``import_path``, so that the resolved options run alone.

    Args:
        opt: The options, before they are checked.
        file: Where they came from.
        warnings: Gets modules that register nothing.

    Raises:
        OptionError: With all modules that are not there, not one only, or cannot be imported.
    """
    problems: list[str] = []
    names = _texts(opt, MODULES_KEY, "module names", problems)
    given = _texts(opt, FOLDERS_KEY, "folders", problems)
    own = [osp.abspath(osp.expanduser(folder)) for folder in given]
    for index, folder in enumerate(own):
        if not osp.isdir(folder):
            problems.append(f"{FOLDERS_KEY}.{index}: there is no folder {given[index]}")
    beside = osp.dirname(osp.expanduser(str(file)))
    importlib.invalidate_caches()  # a file may have been written since a folder was last looked at
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
    """SHA-256 of the code of each module that was imported, by its name; of a package all files count."""
    found = {}
    for name in _texts(opt, MODULES_KEY, "module names", []):
        file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
        code = b"".join(each.read_bytes() for each in files if each.is_file())
        found[name] = hashlib.sha256(code).hexdigest()
    return found


# ------------------------------------------------------------------------------------------------------ where it is


def _name_problem(name: str) -> str | None:
    if "/" in name or os.sep in name or name.endswith(".py"):
        file = Path(name).with_suffix("")
        below = all(part.isidentifier() for part in file.parts)
        written = ".".join(file.parts) if below else f"{file.name}, and {FOLDERS_KEY}: [{file.parent}]"
        return f"{name} is a file; modules are named as Python imports them: write {written}"
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split(".")):
        return f"{name!r} is no name of a module; it is letters, digits and _, with dots between packages"
    return None


def _specs(name: str, folder: str | None) -> list[ModuleSpec]:
    """What Python would import for each part of a dotted name; fewer than parts where it finds no more.

    Args:
        name: Of the module.
        folder: Where to look; None: where Python does. Nothing is imported.
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
    """The file of the module itself; None where it was not found, or is a folder without an ``__init__.py``."""
    return specs[-1].origin if len(specs) == len(name.split(".")) else None


def _first(name: str, places: Iterable[str]) -> tuple[str, str] | None:
    """The first folder that has the module, and the module's file."""
    found = ((folder, _file(name, _specs(name, folder))) for folder in places)
    return next(((folder, file) for folder, file in found if file), None)


def _place_problem(name: str, found: tuple[str, str] | None, places: Sequence[str]) -> str | None:
    """Why a module is not there, or not the only one of its name."""
    by_itself = _specs(name, None)
    other = _file(name, by_itself)
    if found is None:
        if other:
            return None
        for folder in places:
            below = osp.join(folder, *name.split("."))
            if osp.isdir(below):
                return f"{below} is a folder without an __init__.py; name a module in it, {name}.NAME"
        near = difflib.get_close_matches(
            name, [file.stem for folder in places for file in Path(folder).glob("*.py")], 1
        )
        return (
            f"there is no module {name}; looked for in {', '.join(places)} and where Python finds modules. "
            + (
                f"Did you mean {near[0]}?"
                if near
                else f"Put it into one of these, or its folder into {FOLDERS_KEY}"
            )
        )
    folder, file = found
    mine = _specs(name, folder)
    above = by_itself[0].origin if by_itself else None
    if above and not _same(above, mine[0].origin or ""):
        other = other or above  # a package elsewhere hides the one that has the module
    if other and not _same(other, file):
        return f"{file} is hidden by {other}, which has the same name; rename yours"
    return None


def _same(one: str, other: str) -> bool:
    return osp.realpath(one) == osp.realpath(other)


# ------------------------------------------------------------------------------------------------------- importing


def _imported(name: str, found: tuple[str, str] | None) -> str | None:
    """Imports a module; why it cannot be. A module that fails leaves the registries as they were."""
    if name in sys.modules:
        return None
    if found and found[0] not in sys.path:
        sys.path.append(found[0])
    before = {what: dict(iter(registry)) for what, registry in _REGISTRIES.items()}
    there = set(sys.modules)
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        said = _why(name, error, found)
        _roll_back(before, there)
        return said
    if any(dict(iter(registry)).keys() > before[what].keys() for what, registry in _REGISTRIES.items()):
        _registering.add(name)
    return None


def _registers(name: str) -> bool:
    made_by = {
        str(getattr(made, "__module__", "")) for registry in _REGISTRIES.values() for _, made in registry
    }
    return name in _registering or any(f"{module}.".startswith(f"{name}.") for module in made_by)


def _roll_back(before: dict[str, dict[str, Any]], there: set[str]) -> None:
    """Takes out what was registered on the way, and the modules that did it: they would not do it again."""
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
    if found:  # the last line of the user's own code says more than the library below it
        own = [frame for frame in frames if frame.filename.startswith(found[0] + os.sep)]
        frames = [frame for frame in own if "site-packages" not in frame.filename] or frames
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}, line {error.lineno}"
    taken = _already_registered(error)
    if taken:
        kind, entry, by = taken
        return (
            f"{name} cannot be imported: it registers {kind} {entry} ({where}), and there is one of that name "
            f"already, of {by}; give yours another name"
        )
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    said = (text.strip().splitlines() or [""])[0]
    said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return f"{name} cannot be imported: {said}" + (f" ({where})" if where else "")


def _already_registered(error: BaseException) -> tuple[str, str, str] | None:
    """What BasicSR's registry refused: the kind, the name, and the module that has registered it."""
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
