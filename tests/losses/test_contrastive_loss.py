from __future__ import annotations

import pytest
import torch
from basicsr.losses import build_loss

from kdsr.losses.contrastive_loss import ContrasLoss, contrastive_ratio
from kdsr.runtime.errors import OptionError


def random_levels(seed: int, images: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, channels, size, size, generator=generator, dtype=dtype)
        for channels, size in ((3, 6), (5, 3))
    ]


def test_release_value_and_gradient(golden):
    vector = golden.vector
    options = {
        "type": "ContrasLoss",
        "d_func": "L1",
        "loss_weight": vector["contrastive_loss_weight"],
        "weights": vector["layer_weights"],
    }
    loss = build_loss(options)(*(golden.features[name] for name in ("student", "teacher", "negatives")))
    assert golden.relative_error(loss, "contrastive_loss") < 1e-5
    assert golden.relative_error(golden.gradient(loss), "contrastive_grad") < 1e-4


def test_value_by_hand():
    anchor = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    positive = torch.tensor([2.0, 2.5]).view(2, 1, 1, 1)
    negatives = torch.tensor([3.0, 2.0, 0.0, 5.0]).view(4, 1, 1, 1)  # two negatives of two images
    levels = ([anchor], [positive], [negatives])
    # image 0: 1 / (2 + 1), image 1: 0.5 / (0 + 3)
    assert contrastive_ratio(*levels, [2.0]).item() == pytest.approx(2 * 0.75 / 3)
    assert contrastive_ratio(*levels, [2.0], ratio="image").item() == pytest.approx(1 / 3 + 0.5 / 3)
    # squared: 1 / (4 + 1) and 0.25 / (0 + 9)
    assert contrastive_ratio(*levels, [1.0], distance="L2").item() == pytest.approx(0.625 / 7)


@pytest.mark.parametrize("distance", ["L1", "L2"])
@pytest.mark.parametrize("ratio", ["batch", "image"])
def test_gradient_is_the_one_of_the_plain_formula(distance, ratio):
    anchor = [level.requires_grad_() for level in random_levels(0, 2)]
    positive, negatives, weights = random_levels(1, 2), random_levels(2, 6), [0.5, 2.0]
    distances = {"L1": torch.abs, "L2": torch.square}[distance]
    plain = torch.zeros(())
    for a, p, n, weight in zip(anchor, positive, negatives, weights, strict=True):
        to_positive = distances(a - p).mean((1, 2, 3))
        to_negatives = distances(a - n.view(3, *a.shape)).sum(0).mean((1, 2, 3))
        if ratio == "batch":
            to_positive, to_negatives = to_positive.mean(), to_negatives.mean()
        plain = plain + weight * (to_positive / (to_negatives + 1e-7)).mean()
    ours = contrastive_ratio(anchor, positive, negatives, weights, distance=distance, ratio=ratio)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    for got, expected in zip(
        torch.autograd.grad(ours, anchor), torch.autograd.grad(plain, anchor), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_zero_when_the_anchor_is_the_positive():
    anchor, negatives = random_levels(0, 2), random_levels(2, 4)
    assert contrastive_ratio(anchor, anchor, negatives, [1.0, 1.0]).item() == 0


def test_gradient_flows_into_the_anchor_only():
    everything = [random_levels(0, 1), random_levels(1, 1), random_levels(2, 2)]
    for levels in everything:
        for level in levels:
            level.requires_grad_()
    contrastive_ratio(*everything, [1.0, 1.0]).backward()
    anchor, positive, negatives = everything
    assert all(level.grad.abs().sum() > 0 for level in anchor)
    assert all(level.grad is None for level in positive + negatives)


def test_negatives_may_have_an_axis_of_their_own():
    anchor, positive, negatives = random_levels(0, 2), random_levels(1, 2), random_levels(2, 6)
    folded = contrastive_ratio(anchor, positive, negatives, [1.0, 1.0])
    stacked = [level.unflatten(0, (3, 2)) for level in negatives]
    assert torch.equal(folded, contrastive_ratio(anchor, positive, stacked, [1.0, 1.0]))


def test_narrow_features_are_summed_in_float32():
    # 2 ** 16 elements of 1.0 cannot be counted in bfloat16, nor can their mean be told from 1.004
    anchor = torch.zeros(1, 1, 256, 256, dtype=torch.bfloat16, requires_grad=True)
    positive, negatives = (
        torch.ones_like(anchor).detach(),
        torch.full((3, 1, 256, 256), 2.0, dtype=torch.bfloat16),
    )
    loss = contrastive_ratio([anchor], [positive], [negatives], [1.0])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 / 6, rel=1e-6)
    loss.backward()
    assert anchor.grad.dtype == torch.bfloat16


def test_large_level_is_summed_without_loss():
    generator = torch.Generator().manual_seed(3)
    anchor, positive = (torch.randn(1, 64, 192, 192, generator=generator) for _ in range(2))
    negatives = torch.randn(2, 64, 192, 192, generator=generator)
    wide = [[level.double()] for level in (anchor, positive, negatives)]
    expected = contrastive_ratio(*wide, [1.0]).item()
    assert contrastive_ratio([anchor], [positive], [negatives], [1.0]).item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize(
    "options",
    [{"d_func": "cosine"}, {"reduction": "sum"}, {"ratio": "level"}],
    ids=lambda options: next(iter(options)),
)
def test_unknown_values_are_refused(options):
    with pytest.raises(OptionError, match=f"{next(iter(options))} .* is unknown; it can be"):
        ContrasLoss(**options)


def test_mismatched_shapes_are_refused():
    anchor, positive, negatives = random_levels(0, 2), random_levels(1, 2), random_levels(2, 3)
    with pytest.raises(ValueError, match="3 weights"):
        contrastive_ratio(anchor, positive, random_levels(2, 4), [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="level 0"):
        contrastive_ratio(anchor, positive, negatives, [1.0, 1.0])  # 3 images are not K times 2
