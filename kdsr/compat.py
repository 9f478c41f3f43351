"""Lets BasicSR 1.4.2 import on today's torch and torchvision.

``prepare()`` runs before anything of basicsr is imported and does nothing where nothing is needed. It cures two
defects, each only when it shows:

- torchvision's C++ operators do not load (its wheel is built for CUDA, torch is a CPU build): ``import torchvision``
  dies on the missing schema of ``torchvision::nms``. Declaring the two schemas is enough for what BasicSR uses.
- ``torchvision.transforms.functional_tensor`` is gone since torchvision 0.17, BasicSR still imports
  ``rgb_to_grayscale`` from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

_NMS_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_kept_libraries: list[object] = []  # a torch.library.Library withdraws its schemas when it is collected


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    library = torch.library.Library("torchvision", "DEF")
    for schema in _NMS_SCHEMAS.values():
        library.define(schema)
    _kept_libraries.append(library)
    importlib.import_module("torchvision")


def _alias_functional_tensor() -> None:
    name = "torchvision.transforms.functional_tensor"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    from torchvision.transforms.functional import rgb_to_grayscale

    module = types.ModuleType(name)
    module.rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]
    sys.modules[name] = module


def prepare() -> None:
    """Makes ``import basicsr`` work. Idempotent; called by ``import kdsr``."""
    _import_torchvision()
    _alias_functional_tensor()
