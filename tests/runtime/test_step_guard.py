"""A guarded step: skipped on both paths, counted, clipped; states of another machine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdsr.runtime.precision import LossScale
from kdsr.runtime.step_guard import (
    StepGuard,
    Trained,
    can_skip_on_device,
    fused_where_it_helps,
    keep_own_kernels,
)

CPU = torch.device("cpu")
OPTIMIZERS = [
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.Adagrad, {"lr": 0.1}),
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3))


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def poisoned(batch: Tensor, value: float = math.nan) -> Tensor:
    batch = batch.clone()
    batch[0, 1, 2, 3] = value
    return batch


def guarded(net: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> StepGuard:
    return StepGuard({"grad_norm": Trained(net, optimizer)}, CPU, **options)


def step(guard: StepGuard, net: nn.Module, batch: Tensor, factor: float = 1.0) -> None:
    guard.begin()
    loss = net(batch).square().mean() * factor
    guard.backward(loss)
    guard.step(1, {"l_pix": loss})


def everything(net: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in net.state_dict().values()]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
@pytest.mark.parametrize("bad", [{0}, {2, 3}, {0, 4}])
def test_a_skipped_step_leaves_no_trace(
    kind: Callable[..., torch.optim.Optimizer], options: dict[str, Any], fused: bool, bad: set[int]
) -> None:
    net = network()
    optimizer = kind(net.parameters(), fused=fused, **options)
    guard = guarded(net, optimizer)
    plain = network()
    by_hand = kind(plain.parameters(), fused=fused, **options)
    for index, batch in enumerate(batches(6)):
        step(guard, net, poisoned(batch) if index in bad else batch)
        assert guard.made_on_host is (None if fused else index not in bad)
        assert bool(guard.made) is (index not in bad)
        if index not in bad:
            by_hand.zero_grad()
            plain(batch).square().mean().backward()
            by_hand.step()
        for ours, expected in zip(everything(net), everything(plain), strict=True):
            assert torch.equal(ours, expected)
    assert guard.skipped.item() == len(bad)
    for ours, expected in zip(optimizer.state.values(), by_hand.state.values(), strict=True):
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in ours if ours[key] is not None)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_gradients_can_be_non_finite(fused: bool, value: float) -> None:
    net = network()
    guard = guarded(net, torch.optim.Adam(net.parameters(), fused=fused))
    before = everything(net)
    guard.begin()
    net[2].weight.register_hook(lambda gradient: gradient * value)
    loss = net(batches(1)[0]).square().mean()
    guard.backward(loss)
    guard.step(1, {"l_pix": loss})
    assert loss.isfinite() and not guard.norms["grad_norm"].isfinite()
    assert all(torch.equal(*pair) for pair in zip(everything(net), before, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_one_loss_of_several_is_enough(fused: bool) -> None:
    net = network()
    guard = guarded(net, torch.optim.Adam(net.parameters(), fused=fused))
    before = everything(net)
    guard.begin()
    loss = net(batches(1)[0]).square().mean()
    guard.backward(loss)
    guard.step(1, {"l_pix": loss, "l_odd": torch.tensor(math.nan)})  # a term without gradient
    assert all(torch.equal(*pair) for pair in zip(everything(net), before, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_trained_together_is_skipped_together(fused: bool) -> None:
    first, second, third = network(), network(), network()
    trained = {
        name: Trained(net, torch.optim.Adam(net.parameters(), fused=fused))
        for name, net in (("a", first), ("b", second), ("c", third))
    }
    guard = StepGuard(trained, CPU)
    for batch, moves in ((poisoned(batches(1)[0]), False), (batches(1)[0], True)):
        before = [everything(net) for net in (first, second, third)]
        guard.begin()
        losses = [first(batches(1)[0]).square().mean(), second(batch).square().mean()]
        for loss in losses:
            guard.backward(loss)
        guard.step(1, dict(zip("ab", losses, strict=True)))
        for net, old in zip((first, second), before, strict=False):
            assert torch.equal(everything(net)[0], old[0]) is not moves
        assert torch.equal(everything(third)[0], before[2][0])  # has no gradient
        assert guard.norms.keys() == {"a", "b"}


@pytest.mark.parametrize("fused", [False, True])
def test_after_the_limit_nothing_moves_until_it_may_again(fused: bool) -> None:
    net = network()
    guard = guarded(net, torch.optim.SGD(net.parameters(), lr=0.1, fused=fused), limit=3)
    good = batches(1)[0]
    counted = []
    for batch in [poisoned(good), good, *[poisoned(good)] * 3, good, poisoned(good)]:
        before = everything(net)
        step(guard, net, batch)
        counted.append((guard.skipped.item(), guard.in_a_row.item(), bool(guard.made), bool(guard.failed)))
        if not guard.made:
            assert all(torch.equal(*pair) for pair in zip(everything(net), before, strict=True))
    assert counted == [
        (1, 1, False, True),
        (1, 0, True, False),
        (2, 1, False, True),
        (3, 2, False, True),
        (4, 3, False, True),
        (4, 3, False, False),  # good, and held back
        (4, 3, False, False),
    ]
    guard.try_again()
    step(guard, net, good)
    assert bool(guard.made) and guard.skipped.item() == 4


def test_counters_go_on_from_a_state() -> None:
    net = network()
    guard = guarded(net, torch.optim.SGD(net.parameters(), lr=0.1), loss_scale=LossScale(CPU))
    for _ in range(2):
        step(guard, net, poisoned(batches(1)[0]))
    assert guard.loss_scale is not None
    guard.loss_scale.factor.fill_(32.0)
    state = copy.deepcopy(guard.state())
    other = guarded(net, torch.optim.SGD(net.parameters(), lr=0.1), loss_scale=LossScale(CPU))
    other.load(state)
    step(other, net, poisoned(batches(1)[0]))
    assert (other.skipped.item(), other.in_a_row.item()) == (3, 3)
    assert other.loss_scale is not None and other.loss_scale.factor.item() == 32
    stricter = guarded(net, torch.optim.SGD(net.parameters(), lr=0.1), limit=2)
    stricter.load(state)  # the limit was reached: else it could never go on
    assert (stricter.skipped.item(), stricter.in_a_row.item()) == (2, 0)
    other.load({})  # a state from before there were counters
    assert (other.skipped.item(), other.in_a_row.item()) == (0, 0)
    for damaged in ({"skipped": "many"}, {"in_a_row": -1}, {"skipped": True}):
        with pytest.raises(ValueError, match="numbers of skipped updates"):
            other.load(damaged)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [1e-3, 0.05, 1e3])
def test_clipping_is_torchs(clip: float, fused: bool, scaled: bool) -> None:
    net, plain = network(), network()
    scale = LossScale(CPU) if scaled else None
    guard = guarded(
        net, torch.optim.SGD(net.parameters(), lr=0.1, fused=fused), clip_norm=clip, loss_scale=scale
    )
    by_hand = torch.optim.SGD(plain.parameters(), lr=0.1, fused=fused)
    for batch in batches(3):
        step(guard, net, batch)
        by_hand.zero_grad()
        plain(batch).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), clip)
        by_hand.step()
        assert norm > 0.05
        torch.testing.assert_close(guard.norms["grad_norm"], norm, rtol=0, atol=0)
        assert all(torch.equal(*pair) for pair in zip(everything(net), everything(plain), strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_that_overflow_halve_the_scale_and_bad_losses_do_not(fused: bool) -> None:
    net = network()
    guard = guarded(net, torch.optim.SGD(net.parameters(), lr=0.1, fused=fused), loss_scale=LossScale(CPU))
    assert guard.loss_scale is not None
    good = batches(1)[0]
    factors = []
    for batch, overflow in ((good, False), (good, True), (poisoned(good), False), (good, False)):
        handle = net[2].weight.register_hook(lambda gradient: gradient * math.inf) if overflow else None
        step(guard, net, batch)
        if handle is not None:
            handle.remove()
        factors.append(guard.loss_scale.factor.item())
    assert factors == [65536.0, 32768.0, 32768.0, 32768.0]
    assert guard.skipped.item() == 2 and guard.loss_scale.good_steps.item() == 1


# --------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("Adam", {"lr": 1}, True),
        ("AdamW", {"lr": 1}, True),
        ("SGD", {"lr": 1}, True),
        ("Adagrad", {"lr": 1}, True),
        ("Adam", {"lr": 1, "fused": False}, False),
        ("Adam", {"lr": 1, "foreach": True}, None),
        ("Adam", {"lr": 1, "capturable": True}, None),
        ("Adamax", {"lr": 1}, None),
    ],
)
def test_optimizers_are_fused_on_a_gpu_by_default(
    kind: str, options: dict[str, Any], expected: bool | None
) -> None:
    assert fused_where_it_helps(options, kind, torch.device("cuda")).get("fused") is expected
    assert fused_where_it_helps(options, kind, CPU) == options
    getattr(torch.optim, kind)([nn.Parameter(torch.ones(1))], **fused_where_it_helps(options, kind, CPU))


def test_dampened_momentum_is_read_on_the_host() -> None:
    def sgd(**options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, fused=True, **options)

    assert can_skip_on_device(sgd(momentum=0.9))
    assert not can_skip_on_device(sgd(momentum=0.9, dampening=0.5))


def test_momentum_starts_at_zero_also_after_an_empty_state() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    assert can_skip_on_device(optimizer)
    empty = torch.optim.SGD([parameter], lr=0.1, momentum=0.9).state_dict()
    keep_own_kernels(optimizer)
    optimizer.load_state_dict(empty)
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [0, 0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_loaded_state_does_not_choose_the_kernels(fused: bool) -> None:
    """A run can resume a GPU's state on a CPU, and vice versa."""
    net = network()
    written = torch.optim.Adam(net.parameters(), lr=0.1, fused=not fused)
    net(batches(1)[0]).sum().backward()
    written.step()
    state = copy.deepcopy(written.state_dict())
    reading = torch.optim.Adam(net.parameters(), lr=0.2, fused=fused)
    keep_own_kernels(reading)
    reading.load_state_dict(state)
    (group,) = reading.param_groups
    assert group["fused"] is fused and group["lr"] == 0.1
    guard = guarded(net, reading)
    step(guard, net, poisoned(batches(1)[0]))
    step(guard, net, batches(1)[0])
    assert {entry["step"].item() for entry in reading.state.values()} == {2}
    assert state["param_groups"][0]["fused"] is not fused  # the caller's is as it was
