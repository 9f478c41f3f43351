"""kdsr: knowledge distillation for image restoration, inside BasicSR.

``import kdsr`` makes BasicSR importable and registers every network, loss, data set and model of this package in
BasicSR's registries. Only kdsr's own command line registers later: its help and its first checks need no torch, whose
import takes seconds.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

__version__ = "0.1.0"

# folder -> ending of the modules that register something (BasicSR's own convention)
_REGISTERED = {
    "archs": "_arch",
    "losses": "_loss",
    "data": "_dataset",
    "models": "_model",
}


def register() -> None:
    """Makes BasicSR importable and registers everything. Idempotent."""
    from kdsr import compat

    compat.prepare()
    for folder, ending in _REGISTERED.items():
        package = importlib.import_module(f"{__name__}.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.endswith(ending):
                importlib.import_module(f"{package.__name__}.{module.name}")


def _is_own_command() -> bool:
    """Whether Python was started on kdsr's command line: the installed ``kdsr``, or train.py, test.py or cli.py.

    Judged by what Python was started with (``sys.orig_argv``), so that a process that multiprocessing spawns is not
    taken for its parent: there, unpickled objects need everything to be registered.
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # the module's file is not known yet
        started = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
        return started in ([f"{__name__}.cli"], [f"{__name__}.train"], [f"{__name__}.test"])
    here = os.path.dirname(os.path.abspath(__file__))
    own = [os.path.join(here, name) for name in ("cli.py", "train.py", "test.py")]
    own.append(os.path.join(os.path.dirname(sys.executable), __name__))
    return program in sys.orig_argv and os.path.realpath(program) in map(os.path.realpath, own)


if not _is_own_command():
    register()
