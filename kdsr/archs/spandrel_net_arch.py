"""Networks of spandrel's architectures with random weights, from the arguments of their constructors."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from basicsr.utils.registry import ARCH_REGISTRY

from kdsr.archs.spandrel_arch import Facts, facts_of, fitted, refusal
from kdsr.runtime.errors import OptionError
from kdsr.runtime.suggestions import nearest


@ARCH_REGISTRY.register()
class SpandrelNet:
    """A network of one of spandrel's architectures, from the arguments of its constructor.

    Calling it gives the architecture's own class, as ``Spandrel`` does, with random weights.

    Args:
        architecture: Its name in spandrel: SPAN, HAT, ATD, ...
        parameters: The arguments of its constructor.

    Raises:
        OptionError: There is no such architecture, it cannot be built so, or takes or gives something else than an
            image.
    """

    def __new__(cls, architecture: str, parameters: dict[str, Any] | None = None) -> Any:  # an nn.Module
        options = {"architecture": architecture, "parameters": parameters}
        if problems := cls.option_problems(options):
            raise OptionError([f"SpandrelNet: {problem}" for problem in problems])
        built = _built(architecture, json.dumps(parameters or {}))
        net = cls.constructor(options)(**parameters or {})
        return fitted(net, built.facts, built.call, built.notes)

    @classmethod
    def constructor(cls, options: Mapping[str, Any]) -> Any:
        """The class that ``parameters`` are the arguments of; None where there is none."""
        entry = _architectures().get(str(options.get("architecture")))
        made = type(entry).__orig_bases__[0].__args__[0] if entry is not None else None
        return made if isinstance(made, type) else None  # a union where an architecture has several

    @classmethod
    def facts(cls, options: Mapping[str, Any]) -> Facts:
        """The properties of the network with these options, in which ``option_problems`` has found nothing."""
        return _built(options["architecture"], json.dumps(options.get("parameters") or {})).facts

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """Problems with the options; empty if the network can be built."""
        name, parameters = options.get("architecture"), options.get("parameters") or {}
        if not isinstance(name, str) or not isinstance(parameters, dict):
            return ["architecture: expected text, and a section of parameters"]
        known = _architectures()
        if name not in known:
            return [f"architecture: spandrel does not know {name!r}; {nearest(name, known)}"]
        network = cls.constructor(options)
        if network is None:
            return [
                f"architecture: {name} has several classes; it can only be read from a file (type: Spandrel)"
            ]
        taken = inspect.signature(network).parameters
        problems = [
            f"parameters.{key}: {name} has no such parameter; {nearest(str(key), taken)}"
            for key in parameters
            if key not in taken
        ]
        problems += [
            f"parameters.{key}: is required by {name}"
            for key, parameter in taken.items()
            if parameter.default is parameter.empty and key not in parameters
        ]
        if problems:
            return problems
        try:
            refused = _built(name, json.dumps(parameters)).refused
        except Exception as error:  # from numbers that do not go together
            reason = (str(error).splitlines() or [""])[0]
            return [f"parameters: {name} cannot be built: {type(error).__name__}: {reason}"]
        return [f"architecture: {name} {refused}"] if refused else []


class _Built(NamedTuple):
    facts: Facts
    call: Callable[..., Any]
    notes: tuple[str, ...]
    refused: str | None


def _architectures() -> dict[str, Any]:
    import spandrel  # takes a second

    return {entry.architecture.name: entry.architecture for entry in spandrel.MAIN_REGISTRY}


@functools.lru_cache(maxsize=8)
def _built(name: str, parameters: str) -> _Built:
    """What spandrel finds out about a network of these parameters from its weights."""
    import spandrel

    given = json.loads(parameters)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # draws nothing from the run's generators
        net = SpandrelNet.constructor({"architecture": name})(**given)
        descriptor = _architectures()[name].load(net.state_dict())
    read = getattr(descriptor.model, "hyperparameters", {})
    lost = [key for key, value in given.items() if read.get(key, value) != value]
    note = f"weights do not tell {', '.join(lost)}; type: Spandrel would take spandrel's defaults: test under this type"
    refused = refusal(descriptor, isinstance(descriptor, spandrel.ImageModelDescriptor))
    return _Built(facts_of(descriptor), descriptor._call_fn, (note,) if lost else (), refused)
