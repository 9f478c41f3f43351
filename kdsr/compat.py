"""Lets BasicSR 1.4.2 import on today's torch and torchvision, and without waiting for torchvision and scipy.

``prepare()`` imports basicsr, before anything else does, and cures three defects:

- BasicSR imports all of torchvision and of scipy.stats, which takes longer than torch, for a few functions that few
  runs call. These are imported when they are called.
- torchvision's C++ operators do not load (its wheel is built for CUDA, torch is a CPU build): ``import torchvision``
  dies on the missing schema of ``torchvision::nms``. Declaring the two schemas is enough for what BasicSR uses.
- ``torchvision.transforms.functional_tensor`` is gone since torchvision 0.17, BasicSR still imports
  ``rgb_to_grayscale`` from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

_NMS_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_kept_libraries: list[object] = []  # a torch.library.Library withdraws its schemas when it is collected


class _Deferred(types.ModuleType):
    """Stands for a module, or for a function in one, that is imported when it is used."""

    __path__: list[str] = []
    names_only = False  # while BasicSR is imported: it takes names out of the modules, and uses none

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (_Deferred.names_only or name != "__version__"):
            raise AttributeError(name)  # inspect asks all modules for their __file__
        if _Deferred.names_only:
            return _Deferred(f"{self.__name__}.{name}")
        return getattr(pkgutil.resolve_name(self.__name__), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return pkgutil.resolve_name(self.__name__)(*args, **kwargs)


class _Deferring(MetaPathFinder, Loader):
    """Finds a ``_Deferred`` for each module of some packages."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.split(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Deferred(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return


def _mend_torchvision() -> None:
    """Makes ``import torchvision`` work, for whoever does it."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    if not (folder / "transforms" / "functional_tensor.py").exists():
        moved = _Deferred("torchvision.transforms.functional")
        sys.modules["torchvision.transforms.functional_tensor"] = moved
    for file in folder.glob("_C*"):
        try:
            torch.ops.load_library(str(file))
            return
        except OSError:
            continue
    library = torch.library.Library("torchvision", "DEF")
    for schema in _NMS_SCHEMAS.values():
        library.define(schema)
    _kept_libraries.append(library)


def prepare() -> None:
    """Makes ``import basicsr`` work, and does it. Idempotent; called when kdsr registers."""
    if "basicsr" in sys.modules:
        return
    if "torchvision" not in sys.modules:
        _mend_torchvision()
    finder = _Deferring({"torchvision", "scipy"} - sys.modules.keys())
    kept = set(sys.modules)
    sys.meta_path.insert(0, finder)
    _Deferred.names_only = True
    try:
        importlib.import_module("basicsr")
    finally:
        _Deferred.names_only = False
        sys.meta_path.remove(finder)
        for name in sys.modules.keys() - kept:
            if isinstance(sys.modules[name], _Deferred):
                del sys.modules[name]
