"""Creates the JSON Schema of option files, for editors, from the declarations of the options.

A file may be a piece of an option file, so nothing is required, and a section without ``type`` takes the keys of any
type. A file with ``import_modules`` may have unknown types, networks and options of ``train``. Any value may be a
reference, ``${a.b}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import basicsr.data  # noqa: F401  registers its data sets
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
)

from kdsr.models.sections import NetworkPathOptions
from kdsr.options.check import optimizers, options_of_metric
from kdsr.options.check_data import declared_by
from kdsr.options.files import BASE_KEY, REPLACE_KEY
from kdsr.options.model_keys import ModelKeys
from kdsr.options.signatures import options_of, registered
from kdsr.options.stock import LEARNING_RATE, SCHEDULERS
from kdsr.runtime.declarations import NONE, Option
from kdsr.runtime.distributed import DistOptions
from kdsr.runtime.precision import PrecisionOptions

Rule = dict[str, Any]
_TYPES = {
    int: "integer",
    float: "number",
    bool: "boolean",
    str: "string",
    list: "array",
    dict: "object",
    NONE: "null",
}
_REFERENCE = r"\$\{.+\}"
_ANY_SECTION: Rule = {"type": ["object", "string", "null"], "pattern": _REFERENCE}


def known(registry: Any) -> dict[str, Any]:
    """Returns the entries of a registry that come from BasicSR and kdsr, by name."""
    return {
        name: entry
        for name, entry in sorted(registered(registry).items())
        if entry.__module__.startswith(("basicsr.", "kdsr."))
    }


def known_models() -> dict[str, ModelKeys]:
    """Returns the models that declare their options, by name."""
    models = {name: ModelKeys(model) for name, model in known(MODEL_REGISTRY).items()}
    return {name: keys for name, keys in models.items() if keys.strict}


def _value(option: Option) -> Rule:
    rule: Rule = _limits(option)
    if option.help:
        rule["description"] = option.help
    default = option.default
    if (
        default is not None
        and not callable(default)
        and (not isinstance(default, float) or math.isfinite(default))
    ):
        rule["default"] = default
    return rule


def _limits(option: Option) -> Rule:
    if option.section is not None and dict in option.kinds:
        return _section(option.section.declared())
    names = dict.fromkeys(_TYPES[kind] for kind in option.kinds)
    if "number" in names:
        names.pop("integer", None)
    rule: Rule = {"type": [*dict.fromkeys([*names, "string"])]} if names else {}
    if option.choices:
        words = "|".join(option.choices)
        rule["anyOf"] = [{"enum": list(option.choices)}, {"pattern": f"^({words})$|{_REFERENCE}"}]
    elif names and "string" not in names:
        rule["pattern"] = _REFERENCE
    if option.item is not None:
        rule["items"] = _limits(option.item)
    bounds = (
        ("minimum", option.lowest),
        ("maximum", option.highest),
        ("exclusiveMinimum", option.above),
        ("exclusiveMaximum", option.below),
        ("minItems", option.fewest or math.inf),
    )
    return rule | {name: bound for name, bound in bounds if math.isfinite(bound)}


def _section(declared: Mapping[str, Option], others: bool = False) -> Rule:
    """Returns the rule of a section with declared keys; ``others`` allows further keys."""
    rule = _ANY_SECTION | {
        "properties": {REPLACE_KEY: {"const": True}} | {k: _value(v) for k, v in declared.items()}
    }
    return rule if others else rule | {"additionalProperties": False}


def _by_type(name: str, kinds: Mapping[str, Mapping[str, Option]], definitions: Rule) -> None:
    """Defines a section whose keys depend on ``type``; keys of unknown types are not checked."""
    cases = []
    for kind, declared in kinds.items():
        definitions[f"{name}.{kind}"] = _section({"type": Option("", (str,))} | dict(declared))
        chosen = {"properties": {"type": {"const": kind}}}
        cases.append({"if": chosen, "then": {"$ref": f"#/definitions/{name}.{kind}"}})
    every: Rule = {REPLACE_KEY: {"const": True}, "type": {}}
    for key in {key: None for declared in kinds.values() for key in declared}:
        rules = [_limits(declared[key]) for declared in kinds.values() if key in declared]
        every[key] = rules[0] if all(rule == rules[0] for rule in rules) else {"anyOf": rules}
    definitions[name] = _ANY_SECTION | {
        "if": {"required": ["type"]},
        "then": {"allOf": cases},
        "else": {"properties": every, "additionalProperties": False},
    }


def _one_of(names: Any) -> Rule:
    return {"properties": {"type": {"anyOf": [{"enum": [*names]}, {"pattern": _REFERENCE}]}}}


def json_schema() -> Rule:
    """Returns the schema, in draft 7, which most editors support."""
    models = known_models()
    networks, losses, metrics, datasets = map(
        known, (ARCH_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, DATASET_REGISTRY)
    )
    definitions: Rule = {}

    def arguments(entries: Mapping[str, Callable[..., Any]]) -> dict[str, dict[str, Option]]:
        return {name: options_of(entry) for name, entry in entries.items()}

    weight = Option("Weight of the loss: a number, or a schedule.", (int, float, list, dict), 1.0)
    _by_type("network", arguments(networks), definitions)
    _by_type("loss", {k: v | {"loss_weight": weight} for k, v in arguments(losses).items()}, definitions)
    _by_type("metric", {name: options_of_metric(name, entry) for name, entry in metrics.items()}, definitions)
    _by_type(
        "optimizer",
        {name: options_of(entry, ["params"]) | LEARNING_RATE for name, entry in optimizers().items()},
        definitions,
    )
    _by_type("scheduler", {name: entry.declared() for name, entry in SCHEDULERS.items()}, definitions)
    declared = {name: declared_by(entry) for name, entry in datasets.items()}
    _by_type("dataset", {name: entry.declared() for name, entry in declared.items() if entry}, definitions)

    top: dict[str, Option] = {}
    sections: dict[str, dict[str, Option]] = {"train": {}, "path": {}, "val": {}, "logger": {}}
    for keys in models.values():
        top |= keys.top
        for section, found in sections.items():
            found |= getattr(keys, section)
    rules = {name: _section(found, others=name in ("train", "path")) for name, found in sections.items()}
    rules["dist_params"], rules["precision"] = (
        _section(DistOptions.declared()),
        _section(PrecisionOptions.declared()),
    )
    for key, rule in rules["train"]["properties"].items():
        kind = "optimizer" if key.startswith("optim_") else "scheduler" if key == "scheduler" else "loss"
        if kind != "loss" or key.endswith("_opt"):
            rules["train"]["properties"][key] = _refer(kind, rule)
    rules["path"]["patternProperties"] = {
        f"^{name}_(?!t$)": _value(option) for name, option in NetworkPathOptions.declared().items()
    }
    metrics_rule = _ANY_SECTION | {"additionalProperties": {"$ref": "#/definitions/metric"}}
    metrics_rule["properties"] = {REPLACE_KEY: {"const": True}}
    rules["val"]["properties"]["metrics"] |= metrics_rule
    rules["datasets"] = _ANY_SECTION | {
        "properties": {REPLACE_KEY: {"const": True}},
        "patternProperties": {"^(train|val|test)(_.*)?$": {"$ref": "#/definitions/dataset"}},
        "additionalProperties": False,
    }
    properties = {key: _value(option) | rules.get(key, {}) for key, option in top.items()}
    network_keys = {key: rule for key, rule in properties.items() if key.startswith("network_")}
    networks_of_type = {
        key for key, rule in network_keys.items() if not {"boolean", "array"} & {*rule["type"]}
    }
    network: Rule = {"$ref": "#/definitions/network"}
    for rule in network_keys.values():
        if "array" in rule["type"]:
            rule |= {"if": {"type": "array"}, "then": {"items": network}, "else": network}
    others = "|".join(sorted(network_keys.keys() - networks_of_type))  # may be `true`
    network_pattern = rf"^network_(?!({others.replace('network_', '')})$)"
    properties[BASE_KEY] = {
        "description": "Files that this one is merged over, relative to it.",
        "type": ["string", "array", "null"],
        "items": {"type": "string"},
    }
    train = {"propertyNames": {"enum": [REPLACE_KEY, *sections["train"]]}}
    types = {
        key: _one_of(
            [name for name, loss in losses.items() if not option.losses or issubclass(loss, option.losses)]
        )
        for key, option in sections["train"].items()
        if key.endswith("_opt")
    }
    types |= {
        "optim_g": _one_of(optimizers()),
        "optim_d": _one_of(optimizers()),
        "scheduler": _one_of(SCHEDULERS),
    }
    strict = {
        "propertyNames": {"enum": [*properties]},
        "properties": {
            "model_type": _one_of(known(MODEL_REGISTRY))["properties"]["type"],
            "train": {"properties": types},
            "val": {"properties": {"metrics": {"additionalProperties": _one_of(metrics)}}},
            "datasets": {"additionalProperties": _one_of(datasets)},
            "path": {"propertyNames": {"enum": [REPLACE_KEY, *sections["path"]]}},
        },
        "patternProperties": {"^network_": _one_of(networks) | {"items": _one_of(networks)}},
        # BasicSR's other models read keys that are not declared
        "if": {"properties": {"model_type": {"enum": [*models]}}},
        "then": {"properties": {"train": train}},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Option files of kdsr",
        "description": "Written by `kdsr schema`.",
        "type": "object",
        "properties": properties,
        "patternProperties": {network_pattern: network},
        "additionalProperties": False,
        "if": {"required": ["import_modules"]},
        "else": strict,
        "definitions": definitions,
    }


def _refer(name: str, rule: Rule) -> Rule:
    """Returns a reference to a definition, with the description of the option."""
    return {"description": rule.get("description", ""), "allOf": [{"$ref": f"#/definitions/{name}"}]}


def as_text(schema: Rule) -> str:
    """Returns the schema as JSON, with one line for each entry of the first two levels."""
    parts = []
    for key, value in schema.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, dict):
            lines = (
                f"  {json.dumps(name)}: {json.dumps(rule, ensure_ascii=False)}"
                for name, rule in value.items()
            )
            text = "{\n" + ",\n".join(lines) + "\n }"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
