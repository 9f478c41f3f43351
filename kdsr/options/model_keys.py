"""The option keys that models declare, and checks for keys that have no effect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.sections import (
    LoggerOptions,
    NetworkPathOptions,
    PathOptions,
    StockLoggerOptions,
    StockPathOptions,
    StockValOptions,
    ValOptions,
)
from kdsr.models.trainer import LoopInterface
from kdsr.options.signatures import registered
from kdsr.options.stock import STOCK_MODELS, TopOptions
from kdsr.runtime.declarations import NONE, Network, Option
from kdsr.runtime.suggestions import nearest


class ModelKeys:
    """The options that a model class reads, by section; ``strict`` is False if it does not declare them."""

    def __init__(self, model: type | None) -> None:
        self.name = model.__name__ if model else "the model"
        self.ours = model is not None and issubclass(model, LoopInterface)
        stock = None if self.ours else STOCK_MODELS.get(self.name)
        declared, networks = stock or (getattr(model, "train_options", None), getattr(model, "NETWORKS", {}))
        self.strict = declared is not None
        self.train: dict[str, Option] = dict(declared.declared()) if declared else {}
        self.networks: dict[str, Network] = dict(networks)
        for term in getattr(model, "term_classes", list)():
            self.train |= term.options.declared()
            self.networks |= term.NETWORKS
        path, val, logger = (
            (PathOptions, ValOptions, LoggerOptions)
            if self.ours
            else (StockPathOptions, StockValOptions, StockLoggerOptions)
        )
        self.top, self.path = dict(TopOptions.declared()), dict(path.declared())
        self.val, self.logger = val.declared(), logger.declared()
        if self.ours:
            self.top["precision"] = Option("Arithmetic of the training.", (dict, NONE))
        for key, network in self.networks.items():
            self.top[f"network_{key}"] = network
            for name, of in NetworkPathOptions.declared().items():
                listed = list in network.kinds  # several networks
                self.path[f"{name}_{key}"] = replace(of, kinds=(*of.kinds, list), item=of) if listed else of


def read_by_others(section: str, options: dict[str, Any], keys: ModelKeys, problems: list[str]) -> list[str]:
    """Reports the keys of a section that the model does not read and other models do.

    Args:
        section: ``train``, ``val``, ``path``, or ``top`` for the top level.
        options: The section.
        keys: The keys of the model.
        problems: Receives a message for each such key.

    Returns:
        These keys.
    """
    known = getattr(keys, section)
    foreign = [key for key in options if key not in known] if keys.strict else []
    if not foreign:
        return []
    others = {name: getattr(ModelKeys(model), section) for name, model in registered(MODEL_REGISTRY).items()}
    place = "" if section == "top" else f"{section}."
    reported = []
    for key in foreign:
        takers = sorted(name for name, theirs in others.items() if key in theirs)
        if takers:
            names = (
                f"{', '.join(takers[:-1])} and {takers[-1]} do" if len(takers) > 1 else f"{takers[0]} does"
            )
            problems.append(f"{place}{key}: {keys.name} does not read it; {names}")
            reported.append(key)
    return reported


def readers_of(model: type | None) -> dict[str, set[str]]:
    """Returns the options of a model that only have an effect together with another option.

    Returns:
        Keys of ``train`` or ``network_X``, each with the keys of ``train`` that use it.
    """
    readers: dict[str, set[str]] = {}
    for key, declared in ModelKeys(model).train.items():
        if declared.read_with:
            readers[key] = {declared.read_with}
    for term in getattr(model, "term_classes", list)():
        networks = [f"network_{key}" for key in term.NETWORKS]
        for key in [*(term.options.declared().keys() - {term.KEY}), *networks]:
            readers.setdefault(key, set()).add(term.KEY)
    return readers


def report_idle_keys(
    opt: dict[str, Any], model: type | None, problems: list[str], warnings: list[str]
) -> None:
    """Reports options without effect because the option that uses them is missing.

    An option that is ``null`` is not missing. A loss without effect, and ``path`` options of missing networks, are
    problems; others are warnings.
    """
    train, path = ({} if not isinstance(opt.get(key), dict) else opt[key] for key in ("train", "path"))
    keys = ModelKeys(model)
    for key, readers in readers_of(model).items():
        of_network = key.startswith("network_")
        if (opt if of_network else train).get(key) is not None and not readers & train.keys():
            wanted = " or ".join(f"train.{reader}" for reader in sorted(readers))
            line = f"{key if of_network else f'train.{key}'}: has no effect without {wanted}"
            if key.endswith("_opt"):  # otherwise a loss would be missing
                problems.append(line)
            else:
                warnings.append(line)
    for network in sorted(keys.networks) if keys.strict else ():
        section = f"network_{network}"
        if section in opt and not isinstance(opt[section], bool):
            continue
        why = f"{section} is a copy of the student" if section in opt else f"there is no {section}"
        problems += [
            f"path.{kind}_{network}: has no effect, {why}; remove it"
            for kind in NetworkPathOptions.declared()
            if path.get(f"{kind}_{network}") is not None
        ]


def resumed_problems(ignored: Any, opt: dict[str, Any], keys: ModelKeys) -> list[str]:
    """Checks ``path.ignore_resume_networks`` for missing networks and for networks in the training state."""
    place, problems = "path.ignore_resume_networks", []
    networks = [key for key in opt if str(key).startswith("network_")]
    for name in [ignored] if isinstance(ignored, str) else ignored if isinstance(ignored, list) else ():
        if name not in networks or name not in keys.top:
            problems.append(f"{place}: there is no {name!r}; {nearest(str(name), networks)}")
        elif keys.ours and keys.networks[name.removeprefix("network_")].in_state:
            problems.append(f"{place}: {name} is always restored from the training state; remove it")
    return problems
