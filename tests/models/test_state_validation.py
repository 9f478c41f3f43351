"""What a state must look like before it is taken over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from basicsr.models.lr_scheduler import MultiStepRestartLR
from torch import nn

from kdsr.models.state_validation import (
    best_problem,
    generator_problem,
    loading_state,
    networks_problem,
    optimizer_problem,
    same_kind,
    scheduler_problem,
)
from kdsr.runtime.errors import CheckpointError

OPTIMIZERS = [
    "Adam", "AdamW", "SGD", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "ASGD", "RMSprop", "Rprop", "Adafactor",
]  # fmt: skip


def after_a_step(kind: str, **options: Any) -> torch.optim.Optimizer:
    net = nn.Conv2d(3, 4, 3)
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(net.parameters(), lr=0.1, **options)
    MultiStepRestartLR(optimizer, milestones=[3])
    net(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_of_every_optimizer_of_torch_fits_itself(kind: str) -> None:
    optimizer = after_a_step(kind, **({"momentum": 0.9} if kind in ("SGD", "RMSprop") else {}))
    assert optimizer_problem(optimizer.state_dict(), optimizer) is None


def test_all_parameters_of_a_kind_have_the_same_message() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    del state["state"][2]["exp_avg"]
    assert optimizer_problem(state, optimizer) == "does not say the same of all parameters"


def replace(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["state"][0][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("exp_avg", torch.zeros(4)), "has the shape"),
        (replace("exp_avg", torch.zeros(())), "has the shape"),
        (replace("exp_avg", 1.0), "is no tensor"),
        (replace("exp_avg", torch.zeros(4, 3, 3, 3, dtype=torch.float64)), "is torch.float64"),
        (replace("exp_avg", torch.zeros(4, 3, 3, 3).to_sparse()), "is no tensor"),
        (replace("step", torch.ones(7)), "is no number"),
        (replace("step", torch.tensor(True)), "is no number"),
        (replace("more", 1), "more of parameter 0 is no tensor"),
        (lambda state: state["state"].update({9: state["state"][0]}), "a parameter 9"),
        (lambda state: state["param_groups"][0].update(lr="fast"), "has lr: fast"),
        (lambda state: state["param_groups"][0].update(betas=[0.9]), "has betas"),
        (lambda state: state["param_groups"][0].update(params=[0]), "is for 1 parameters"),
        (lambda state: state["param_groups"][0].update(params=[0, [1]]), "names no parameters"),
        (lambda state: state.update(param_groups=[]), "other groups"),
        (lambda state: state.pop("state"), "is no optimizer's"),
    ],
)
def test_what_no_optimizer_has_written_is_reported(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    optimizer = after_a_step("Adam")
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    assert message in str(optimizer_problem(state, optimizer))


def test_a_scheduler_takes_no_attributes_that_are_not_its_own() -> None:
    scheduler = MultiStepRestartLR(after_a_step("Adam"), milestones=[3, 5])
    state = scheduler.state_dict()
    assert scheduler_problem(state, scheduler) is None
    assert scheduler_problem({**state, "from_another_version": 1}, scheduler) is None
    for more in ({"step": 5}, {"optimizer": None}, {"milestones": 3}, {"gamma": "x"}, {7: 7}):
        assert scheduler_problem({**state, **more}, scheduler), more
    assert scheduler_problem({}, scheduler) and scheduler_problem([], scheduler)


def test_generators_are_tried_without_being_set() -> None:
    before = torch.get_rng_state()
    own = {"model": torch.Generator().get_state(), "torch": before}
    assert generator_problem(own, ["model", "torch"]) is None
    for odd in (torch.zeros(3, dtype=torch.uint8), torch.zeros(5056), [1], None):
        assert (
            generator_problem({**own, "torch": odd}, ["model", "torch"]) == "torch is no state of a generator"
        )
    assert generator_problem({"model": own["model"]}, ["model", "torch"])
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_and_best_values() -> None:
    own = {"net_g": {"weight": torch.zeros(2)}}
    assert networks_problem({"net_g": {"weight": torch.ones(2)}}, own) is None
    assert networks_problem({"net_g": {"weight": torch.ones(2).half()}}, own) == (
        "net_g.weight is torch.float16, not torch.float32"
    )
    assert networks_problem({"net_g": {"weight": [1, 2]}}, own)
    assert networks_problem({"net_g": 5}, own) and networks_problem(None, own)
    best = {"Set5": {"psnr": {"better": "higher", "val": 30.0, "iter": 10}}}
    assert best_problem(best) is None and best_problem({}) is None
    assert best_problem({"Set5": {"psnr": 30.0}}) and best_problem({"Set5": 3}) and best_problem(7)


def test_alike() -> None:
    assert same_kind(2, 1.0) and same_kind([1, 2], (3, 4)) and same_kind({"a": None}, {"a": None})
    unlike: list[tuple[Any, Any]] = [(True, 1), (1, True), ([1], [1, 2]), ({"a": 1}, {"b": 1})]
    assert not any(same_kind(*pair) for pair in unlike)


def test_what_goes_wrong_is_the_files_fault() -> None:
    message = r"7\.state: no run can go on from it \(KeyError: 'x'\)"
    with pytest.raises(CheckpointError, match=message), loading_state("7.state"):
        {}["x"]
