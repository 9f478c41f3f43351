"""Finds the state to resume from, and compares its options with the current ones."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from kdsr.data.stored_outputs import fingerprint
from kdsr.distill.weight_files import each_network, weight_files
from kdsr.models.cached_teacher import is_outputs
from kdsr.options.user_modules import module_fingerprints
from kdsr.runtime.checkpoint import read_checkpoint
from kdsr.runtime.declarations import Options, check_section
from kdsr.runtime.errors import CheckpointError, OptionError

_NEEDED = {"iter": int, "optimizers": list, "schedulers": list}


class _Position(Options):
    epoch: int
    samples: int


class _Fingerprints(Options):
    options: str
    train_set: str
    networks: dict
    modules: dict


class _State(Options):
    """Kinds of what a state may hold beside what is needed."""

    epoch: int
    manual_seed: int | None
    networks: dict
    best_metric_results: dict
    generators: list
    position: _Position
    options: dict
    fingerprints: _Fingerprints
    weights: list
    extra: dict


# prefixes of options that do not change the result of a resumed run
_WITHOUT_EFFECT = (
    "name",
    "path.init_from",
    "path.resume_state",
    "import_path",
    "path.experiments_root",
    "path.results_root",
)


def read_state(path: Path) -> dict[str, Any]:
    """Reads a training state to the CPU.

    Raises:
        CheckpointError: The file is missing, unreadable or not a training state.
    """
    state = read_checkpoint(path)
    for key, kind in _NEEDED.items():
        if not isinstance(state.get(key), kind):
            raise CheckpointError(f"{path}: is not a training state (it has no {key})")
    if state["iter"] < 1:
        raise CheckpointError(f"{path}: is not a training state (its iteration is {state['iter']})")
    problems: list[str] = []
    kinds = _State.declared()
    check_section({key: value for key, value in state.items() if key in kinds}, kinds, "", problems)
    if not problems:
        counts = [
            *(state.get("position") or {}).values(),
            state.get("epoch", 0),
            state.get("manual_seed") or 0,
        ]
        if not all(0 <= count < 2**63 for count in counts):
            problems.append("position, epoch or manual_seed: not a whole number in [0, 2^63)")
    if problems:
        raise CheckpointError(f"{path}: is not a training state ({problems[0]})")
    return state


def newest_state(folder: Path, models: Path) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
    """The newest state that loads and whose weight files exist.

    Args:
        folder: ``training_states`` of a run.
        models: ``models`` of the run, with the weight files.

    Returns:
        The state and its file, or None for both, and why newer states were skipped.

    Raises:
        CheckpointError: A state cannot be opened, and may be sound.
    """
    named = [path for path in folder.glob("*.state") if path.stem.isdecimal()] if folder.is_dir() else []
    skipped = []
    for path in sorted(named, key=lambda path: int(path.stem), reverse=True):
        _require_access(path)
        try:
            state = read_state(path)
        except CheckpointError as error:
            skipped.append(f"Skipped a state that does not load: {error}")
            continue
        absent = [name for name in state.get("weights", ()) if not (models / str(name)).is_file()]
        if absent:
            skipped.append(f"Skipped a state whose weights are missing: {path} names {models / absent[0]}")
            continue
        return state, path, skipped
    return None, None, skipped


def _require_access(path: Path) -> None:
    if path.is_file():
        try:
            path.open("rb").close()
        except OSError as error:  # no permission, or an unmounted disk: the state may be sound
            raise CheckpointError(
                f"{path}: cannot be opened ({error.strerror}); fix that, or start the run under another name"
            ) from error


def set_aside_later(folder: Path, iteration: int) -> list[str]:
    """Renames states later than ``iteration`` to ``N.state.set_aside``, so that ``--auto_resume`` does not find them.

    Returns:
        Lines for the log.
    """
    later = [path for path in folder.glob("*.state") if path.stem.isdecimal() and int(path.stem) > iteration]
    for path in later:
        path.rename(f"{path}.set_aside")
    return [f"{path} is later than the state that the run resumes from: set aside" for path in sorted(later)]


# ---------------------------------------------------------------------------------------------- fingerprints


def run_record(options: dict[str, Any], train_set: Any) -> dict[str, Any]:
    """The part of a state that describes the run.

    Args:
        options: The resolved options of the user.
        train_set: The training set.

    Returns:
        ``options``, and ``fingerprints`` of the options, the training set, each pretrained network and each
        user module.
    """
    text = json.dumps(options, sort_keys=True, default=str)
    return {
        "options": options,
        "fingerprints": {
            "options": hashlib.sha256(text.encode()).hexdigest(),
            "train_set": fingerprint_of_set(train_set),
            "networks": fingerprints_of_networks(options),
            "modules": module_fingerprints(options),
        },
    }


def fingerprint_of_set(dataset: Any) -> str:
    """A hash of a data set's images: names below the data root and, for files, sizes in bytes."""
    digest = hashlib.sha256()
    opt = dataset.opt
    for key in ("dataroot_gt", "dataroot_lq"):
        root = opt.get(key)
        if root is not None and root.endswith(".lmdb"):
            digest.update(Path(root, "meta_info.txt").read_bytes())
    paths = getattr(dataset, "paths", None)
    if not isinstance(paths, list):
        digest.update(str(len(dataset)).encode())
        return digest.hexdigest()
    roots = [os.path.abspath(opt[key]) for key in ("dataroot_gt", "dataroot_lq") if opt.get(key)]
    entries = []
    for path in paths:
        for file in path.values() if isinstance(path, dict) else (path,):
            entries.append(_name_and_size(str(file), roots))
    # Sorted, as in training: folders list their files in any order.
    digest.update("\n".join(sorted(entries)).encode())
    return digest.hexdigest()


def _name_and_size(file: str, roots: list[str]) -> str:
    whole = os.path.abspath(file)
    root = next((root for root in roots if whole.startswith(root + os.sep)), None)
    try:
        size = os.path.getsize(whole)
    except OSError:  # the key of an LMDB
        return file
    return f"{os.path.relpath(whole, root) if root else file} {size}"


def fingerprints_of_networks(opt: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Path and SHA-256 of each network's weight file, by the network's key."""
    found = {}
    for key, file in weight_files(opt).items():
        with open(os.path.expanduser(file), "rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        found[key] = {"path": str(file), "sha256": sha256}
    if is_outputs(opt.get("network_t")):
        path = opt["network_t"]["path"]
        found["t"] = {"path": path, "sha256": fingerprint(os.path.expanduser(path))}
    return found


# ---------------------------------------------------------------------------------------------- changes


def changes(
    state: dict[str, Any], record: dict[str, Any], file: Path | str, force: bool = False
) -> list[str]:
    """Compares the run that wrote a state with the run that resumes from it.

    The new options apply. Other networks or training images are refused.

    Args:
        state: The state.
        record: ``run_record`` of the new run.
        file: The state's file, for messages.
        force: ``--force_resume``: list what would be refused, and continue.

    Returns:
        Lines for the log; empty if nothing has changed.

    Raises:
        OptionError: Networks or training images have changed.
    """
    if "options" not in state:
        return [f"{file}: holds no options of the run that wrote it; nothing was compared"]
    old, new = state["fingerprints"], record["fingerprints"]
    trained = {name.removeprefix("net_") for name in state.get("networks", {})}
    lines: list[str] = []
    refused: list[str] = []
    for key, before, after in _differences(each_network(state["options"]), each_network(record["options"])):
        change = f"{key}: {_shown(before)} -> {_shown(after)}"
        network = key.partition(".")[0]
        if network.startswith("network_"):
            own = network.removeprefix("network_") in trained
            refused.append(
                f"{change}; {'the state holds' if own else 'the run was trained with'} another network"
            )
        elif key.startswith("path.param_key_"):
            name = key.removeprefix("path.param_key_")
            if name in trained:
                lines.append(f"{change}; no effect, the state's weights are used")
            elif len({"params" if one is _ABSENT else one for one in (before, after)}) > 1:
                refused.append(f"{change}; these may be other weights of the same file")
        elif key.startswith("path.pretrain_network_"):
            name = key.removeprefix("path.pretrain_network_")
            if name in trained:
                lines.append(f"{change}; no effect, the state's weights are used")
            elif old["networks"].get(name, {}).get("sha256") == new["networks"].get(name, {}).get("sha256"):
                lines.append(f"{change}; the same weights")
        elif key.startswith(_WITHOUT_EFFECT):
            lines.append(f"{change}; no effect on a resumed run")
        elif key.startswith(("train.optim_", "train.scheduler", "train.warmup_iter")):
            lines.append(f"{change}; the new value applies, to the schedule from its beginning")
        elif key == "manual_seed":
            lines.append(f"{change}; the new seed gives the order of the data, generators continue as saved")
        else:
            lines.append(f"{change}; the new value applies from here on")
    for name in sorted(old["networks"].keys() | new["networks"].keys()):
        was, now = (networks.get(name) for networks in (old["networks"], new["networks"]))
        if name not in trained and (was or {}).get("sha256") != (now or {}).get("sha256"):
            given = f"pretrain_network_{name}" in (each_network(record["options"]).get("path") or {})
            place = f"path.pretrain_network_{name}" if given or not now else f"network_{name}.path"
            refused.append(f"{place}: the weights have changed ({_origin(was)}, now {_origin(now)})")
    was, now = old.get("modules", {}), new["modules"]
    lines += [
        f"import_modules: the code of {name} has changed; the new code applies from here on"
        for name in sorted(was.keys() & now.keys())
        if was[name] != now[name]
    ]
    if old["train_set"] != new["train_set"]:
        refused.append(_other_images(state["options"], record["options"]))
    if refused and not force:
        raise OptionError(
            [
                *(f"{file}: {problem}" for problem in refused),
                "this would be another run: give it another name, or resume anyway with --force_resume",
            ]
        )
    return [*(f"{problem}; resumed anyway (--force_resume)" for problem in refused), *lines]


def _other_images(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The message that the training images have changed, with options that may be the cause."""
    was, now = ((options.get("datasets") or {}).get("train") or {} for options in (old, new))
    keys = ("type", "dataroot_gt", "dataroot_lq", "meta_info_file")
    message = "datasets.train: the images have changed (names, number or sizes)"
    for key, before, after in _differences(was, now):
        if key in keys:
            message += f"; {key}: {_shown(before)} -> {_shown(after)}"
    kinds = [
        "an LMDB" if any(str(options.get(key)).endswith(".lmdb") for key in keys) else "a folder of files"
        for options in (was, now)
    ]
    if kinds[0] != kinds[1]:
        message += (
            f"; it was {kinds[0]} and is {kinds[1]} now, which cannot be compared: if the images are the same, "
            "--force_resume is safe"
        )
    return message


def _differences(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            difference
            for key in keys
            for difference in _differences(
                old.get(key, _ABSENT), new.get(key, _ABSENT), f"{place}.{key}" if place else str(key)
            )
        ]
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    return [] if same else [(place, old, new)]


class _Absent:
    def __str__(self) -> str:
        return "(not there)"


_ABSENT = _Absent()


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _origin(network: dict[str, str] | None) -> str:
    return f"{network['path']} {network['sha256'][:12]}" if network else "none"
