"""MCLIR's negative loss: its value by hand, its gradient, and what is refused."""

from __future__ import annotations

import pytest
import torch
from basicsr.losses import build_loss
from torch.autograd import gradcheck

from kdsr.losses.negative_loss import NegativeLoss, distance_to_negatives
from kdsr.runtime.errors import OptionError


def levels(seed: int, samples: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, 3, size, size, generator=generator, dtype=dtype) for size in (4, 2)]


@pytest.mark.parametrize(("distance", "expected"), [("L1", 0.5 * 2 + 2 * 3.5), ("L2", 0.5 * 5 + 2 * 12.5)])
def test_value_by_hand(distance: str, expected: float) -> None:
    """Two images with two negatives each; those of the first one come first."""
    anchor = [torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)]
    negatives = [
        torch.tensor([1.0, -1.0, 3.0, -3.0]).view(4, 1, 1, 1),
        torch.tensor([4.0, 6.0, 5.0, 5.0]).view(4, 1, 1, 1),
    ]
    value = distance_to_negatives(anchor, negatives, (0.5, 2.0), distance)
    assert value.item() == pytest.approx(expected)
    loss = build_loss({"type": "NegativeLoss", "loss_weight": 0.1, "weights": [0.5, 2], "d_func": distance})
    assert loss(anchor, negatives).item() == pytest.approx(-0.1 * expected)


@pytest.mark.parametrize("distance", ["L1", "L2"])
def test_gradient_is_the_one_of_its_equation(distance: str) -> None:
    anchor = [level.requires_grad_() for level in levels(0, 2)]
    assert gradcheck(lambda *a: distance_to_negatives(a, levels(1, 4), (0.3, 0.7), distance), anchor)


def test_a_gradient_step_increases_the_distance_to_the_negatives() -> None:
    anchor, negatives = ([level.requires_grad_() for level in levels(seed, 2)] for seed in (0, 1))
    loss = NegativeLoss(loss_weight=1.0, weights=(1.0, 1.0))
    before = loss(anchor, negatives)
    before.backward()
    moved = [level.detach() - 0.1 * level.grad for level in anchor]
    assert loss(moved, negatives) < before < 0
    assert all(level.grad is None for level in negatives)


def test_a_level_of_weight_0_is_skipped() -> None:
    anchor, negatives = levels(0, 2), levels(1, 2)
    negatives[1] = negatives[1] * float("nan")
    assert NegativeLoss(weights=(1.0, 0.0))(anchor, negatives).isfinite()


def test_narrow_features_are_summed_in_float32() -> None:
    anchor, negative = torch.full((1, 1, 256, 256), 1.0), torch.zeros(1, 1, 256, 256)
    anchor[..., 0] = 2.0
    value = distance_to_negatives([anchor.bfloat16()], [negative.bfloat16()], (1.0,))
    assert value.dtype == torch.float32 and value.item() == pytest.approx(1 + 1 / 256, rel=1e-6)


def test_mismatched_shapes_are_refused() -> None:
    anchor, negatives = levels(0, 2), levels(1, 4)
    with pytest.raises(ValueError, match="2 levels of the anchor and 2 of the negatives, but 1 weights"):
        distance_to_negatives(anchor, negatives, (1.0,))
    with pytest.raises(ValueError, match="level 1: .* do not match"):
        distance_to_negatives(anchor, [negatives[0], negatives[1][:3]], (1.0, 1.0))
    with pytest.raises(OptionError, match="d_func 'L3' is unknown; it can be L1 or L2"):
        NegativeLoss(d_func="L3")
