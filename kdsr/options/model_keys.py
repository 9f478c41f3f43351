"""The option keys of models: what each class declares, and which classes read a key that another does not."""

from __future__ import annotations

from typing import Any

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.trainer import LoopInterface
from kdsr.options import declarations as tables
from kdsr.options.signatures import nearest, registered


class ModelKeys:
    """The option keys that a model class reads; ``strict`` says whether it declares them at all."""

    def __init__(self, model: type | None) -> None:
        self.name = model.__name__ if model else "the model"
        self.ours = model is not None and issubclass(model, LoopInterface)
        self.train: dict[str, Any] = {}
        self.networks: frozenset[str] = frozenset()
        self.path, self.val, self.top = dict(tables.PATH), dict(tables.VAL), dict(tables.TOP)
        if model is not None and self.name in tables.STOCK_MODELS and not self.ours:
            self.train, self.networks = tables.STOCK_MODELS[self.name]
            self.val |= tables.STOCK_VAL
        for base in reversed(model.__mro__ if model else ()):
            self.train = self.train | vars(base).get("TRAIN_KEYS", {})
            self.networks |= vars(base).get("NETWORK_KEYS", frozenset())
            self.path |= vars(base).get("PATH_KEYS", {})
            self.val |= vars(base).get("VAL_KEYS", {})
            self.top |= vars(base).get("TOP_KEYS", {})
        for term in getattr(model, "declared_terms", list)():
            self.train |= term.TRAIN_KEYS
            self.networks |= term.NETWORK_KEYS
        self.strict = bool(self.train)
        if self.ours:
            self.path |= tables.OUR_PATH
            self.val |= tables.OUR_VAL
            self.top["precision"] = (dict, tables.NONE)
        for network in self.networks:
            # the release says network_his: true, for the history is a copy of the student
            kinds = (dict, tables.NONE, bool) if network == "his" else (dict, tables.NONE)
            self.top[f"network_{network}"] = kinds
            self.path |= {f"{key}_{network}": kind for key, kind in tables.PATH_OF_NETWORK.items()}


def read_by_others(section: str, options: dict[str, Any], keys: ModelKeys, problems: list[str]) -> list[str]:
    """Reports the keys of a section that the model does not read and other models do.

    Args:
        section: ``train``, ``val``, ``path``, or ``top`` for the top level.
        options: The section.
        keys: Those of the model.
        problems: Gets a line for each such key.

    Returns:
        These keys.
    """
    known = getattr(keys, section)
    foreign = [key for key in options if key not in known] if keys.strict else []
    if not foreign:
        return []
    others = {name: getattr(ModelKeys(model), section) for name, model in registered(MODEL_REGISTRY).items()}
    place = "" if section == "top" else f"{section}."
    told = []
    for key in foreign:
        takers = sorted(name for name, theirs in others.items() if key in theirs)
        if takers:
            names = (
                f"{', '.join(takers[:-1])} and {takers[-1]} do" if len(takers) > 1 else f"{takers[0]} does"
            )
            problems.append(f"{place}{key}: {keys.name} does not read it; {names}")
            told.append(key)
    return told


def readers_of(model: type | None) -> dict[str, set[str]]:
    """What a model reads for the sake of other options only: ``READ_WITH`` of its class and its bases, together.

    Returns:
        A key of ``train``, or ``network_X``, with the keys of ``train`` that make use of it.
    """
    readers: dict[str, set[str]] = {}
    for base in model.__mro__ if model else ():
        for key, more in vars(base).get("READ_WITH", {}).items():
            readers.setdefault(key, set()).update(more)
    for term in getattr(model, "declared_terms", list)():
        networks = [f"network_{key}" for key in term.NETWORK_KEYS]
        for key in [*(term.TRAIN_KEYS.keys() - {term.KEY}), *networks]:
            readers.setdefault(key, set()).add(term.KEY)
    return readers


def report_idle_keys(
    opt: dict[str, Any], model: type | None, problems: list[str], warnings: list[str]
) -> None:
    """Reports options that a training does not read because the option that makes use of them is not there.

    A ``null`` is there: it switches that option off for a run, and what belongs to it may stay. Options of networks
    that are not there are problems, for they name weights that the run would do without; others are warnings.
    """
    train, path = ({} if not isinstance(opt.get(key), dict) else opt[key] for key in ("train", "path"))
    keys = ModelKeys(model)
    for key, readers in readers_of(model).items():
        of_network = key.startswith("network_")
        if (opt if of_network else train).get(key) is not None and not readers & train.keys():
            wanted = " or ".join(f"train.{reader}" for reader in sorted(readers))
            line = f"{key if of_network else f'train.{key}'}: nothing reads it without {wanted}"
            if key.endswith("_opt"):  # a loss that would not be there
                problems.append(line)
            else:
                warnings.append(line)
    for network in sorted(keys.networks) if keys.strict else ():
        section = f"network_{network}"
        if section in opt and not isinstance(opt[section], bool):
            continue
        why = f"{section} is a copy of the student" if section in opt else f"there is no {section}"
        problems += [
            f"path.{kind}_{network}: nothing reads it, {why}; take it out"
            for kind in tables.PATH_OF_NETWORK
            if path.get(f"{kind}_{network}") is not None
        ]


def resumed_problems(ignored: Any, opt: dict[str, Any], keys: ModelKeys) -> list[str]:
    """What is wrong with ``path.ignore_resume_networks``: networks that are not there, or that a state brings back."""
    place, problems = "path.ignore_resume_networks", []
    networks = [key for key in opt if str(key).startswith("network_")]
    for name in [ignored] if isinstance(ignored, str) else ignored if isinstance(ignored, list) else ():
        if name not in networks:
            problems.append(f"{place}: there is no {name!r}; {nearest(str(name), networks)}")
        elif keys.ours and name in ("network_g", "network_d", "network_his"):
            problems.append(f"{place}: {name} is trained, and always goes on from the state; take it out")
    return problems
