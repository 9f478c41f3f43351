"""The option keys of models: what each class declares, and which classes read a key that another does not."""

from __future__ import annotations

from typing import Any

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.base_model import RestorationModel
from kdsr.pipeline import option_tables as tables
from kdsr.pipeline.option_names import registered


class ModelKeys:
    """The option keys that a model class reads; ``strict`` says whether it declares them at all."""

    def __init__(self, model: type | None) -> None:
        self.name = model.__name__ if model else "the model"
        self.ours = model is not None and issubclass(model, RestorationModel)
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
