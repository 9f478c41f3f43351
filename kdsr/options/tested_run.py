"""Derives the options of a test from the option file of a training or the folder of a run."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.trainer import LoopInterface
from kdsr.options.files import read_file
from kdsr.options.overrides import overrides_of
from kdsr.options.signatures import registered
from kdsr.runtime.atomic_files import display_path
from kdsr.runtime.errors import OptionError

# sections of a training only
_OF_TRAINING = ("train", "logger")
_OF_TRAINING_PATHS = re.compile(
    r"(pretrain_network|strict_load|param_key)_|(init_from|resume_state|ignore_resume_networks)$"
)
_OF_STUDENT = ("pretrain_network_g", "strict_load_g", "param_key_g")  # kept if set on the command line


def has_training_set(opt: dict[str, Any]) -> bool:
    """Whether the options have a training set."""
    datasets = opt.get("datasets")
    return isinstance(datasets, dict) and isinstance(datasets.get("train"), dict)


def is_test_only(opt: dict[str, Any]) -> bool:
    """Whether the options are for a test: no training set, and no section ``train`` unless a set is named ``test``."""
    datasets = opt.get("datasets")
    if not isinstance(datasets, dict) or not any(datasets.values()) or datasets.get("train"):
        return False
    return not opt.get("train") or any(key.split("_")[0] == "test" for key in datasets)


def option_file_of(source: str) -> str:
    """Returns ``source``, or, if it is the folder of a run, the newest option file of a training in it.

    Raises:
        OptionError: The folder has no such file.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    files = [
        file for pattern in ("*.yml", "*.yaml") for file in folder.glob(pattern) if _is_training_file(file)
    ]
    if not files:
        raise OptionError(
            f"{source}: this folder has no option file of a training (a .yml with datasets.train); give the folder of "
            "a run, or an option file"
        )
    return str(max(files, key=lambda file: (file.stat().st_mtime_ns, file.name)))


def _is_training_file(file: Path) -> bool:
    try:
        return has_training_set(read_file(file)[0])
    except OptionError:
        return False


def as_test(
    opt: dict[str, Any],
    source: str,
    args: argparse.Namespace,
    root_path: str,
    problems: list[str],
) -> tuple[dict[str, Any], list[str]]:
    """Returns the options of a test for those of a training, and lines for the log.

    The student is tested on the validation sets with the saved weights of its run. ``train``, ``logger``, the other
    networks and the paths of initial weights are removed.

    Args:
        opt: The options of the training, with overrides applied.
        source: The given option file or folder of a run.
        args: The command line; ``args.opt`` is the option file. The override ``path:pretrain_network_g=FILE`` selects
            other weights.
        root_path: Folder that contains ``experiments``.
        problems: Receives the problems.

    Returns:
        The options, at the user's level, and lines for the log.
    """
    file, overrides = args.opt, args.force_yml
    opt = {
        key: value
        for key, value in opt.items()
        if key not in _OF_TRAINING and (not key.startswith("network_") or key == "network_g")
    }
    opt["datasets"] = {name: value for name, value in opt["datasets"].items() if name != "train"}
    if not any(opt["datasets"].values()):
        problems.append(f"datasets: {file} has no validation set (val, val_NAME) to test on")
    path = opt["path"] = dict(opt["path"]) if isinstance(opt.get("path"), dict) else {}
    for key in list(path):
        if _OF_TRAINING_PATHS.match(key) and not (
            key in _OF_STUDENT and overrides_of(overrides, "path", key)
        ):
            del path[key]
    notes = [f"{file} describes a training: its student is tested, on its validation sets"]
    if "pretrain_network_g" in path:
        return opt, notes
    beside = Path(file).expanduser().absolute().parent
    root = Path(path.get("experiments_root") or os.path.join(root_path, "experiments")).expanduser()
    runs = [beside] if os.path.isdir(os.path.expanduser(source)) else [beside, root / str(opt.get("name"))]
    run = next((run for run in runs if _weights(run)), None)
    if run is None and args.random_weights:
        return opt, notes
    if run is None:
        problems.append(
            f"path.pretrain_network_g: {file} describes a training that has saved no weights "
            f"(net_g_latest.pth, net_g_N.pth) in {runs[-1] / 'models'}; train first, or give a file: "
            "--force_yml path:pretrain_network_g=FILE"
        )
        return opt, notes
    if run == beside and not overrides_of(overrides, "name"):
        opt["name"] = run.name  # a renamed run: its results must not replace those of the newer run
    weights, *others = _weights(run)
    path["pretrain_network_g"] = display_path(weights)
    model = registered(MODEL_REGISTRY).get(str(opt.get("model_type")))
    if not (isinstance(model, type) and issubclass(model, LoopInterface)):
        path.setdefault("param_key_g", "params_ema")  # the default of kdsr's models; BasicSR's is params
    others_found = f"; also found: {', '.join(file.name for file in others)}" if others else ""
    notes.append(
        f"weights: {path['pretrain_network_g']}{others_found} (path:pretrain_network_g=FILE selects another)"
    )
    return opt, notes


def _weights(run: Path) -> list[Path]:
    """Returns the student's checkpoints of a run, the newest first.

    ``net_g_latest.pth`` is written only at the end: in a run that was extended and has not ended again, a numbered file
    is newer.
    """
    models = run / "models"
    numbered = [file for file in models.glob("net_g_*.pth") if file.stem.removeprefix("net_g_").isdecimal()]
    numbered.sort(key=lambda file: int(file.stem.removeprefix("net_g_")), reverse=True)
    named = [file for name in ("latest", "best") if (file := models / f"net_g_{name}.pth").is_file()]
    latest = models / "net_g_latest.pth"
    if numbered and (latest not in named or latest.stat().st_mtime_ns < numbered[0].stat().st_mtime_ns):
        return [*numbered[:1], *named, *numbered[1:]]
    return [*named, *numbered]
