"""kdsr: knowledge distillation for image restoration, inside BasicSR.

``import kdsr`` makes BasicSR importable and registers every network, loss, data set and model of this
package in BasicSR's registries.
"""

from __future__ import annotations

import importlib
import pkgutil

from kdsr import compat

__version__ = "0.1.0"

# folder -> ending of the modules that register something (BasicSR's own convention)
_REGISTERED = {
    "archs": "_arch",
    "losses": "_loss",
    "data": "_dataset",
    "models": "_model",
}


def _register_all() -> None:
    for folder, ending in _REGISTERED.items():
        package = importlib.import_module(f"{__name__}.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.endswith(ending):
                importlib.import_module(f"{package.__name__}.{module.name}")


compat.prepare()
_register_all()
