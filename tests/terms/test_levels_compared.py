"""Features-only passes end at the last level whose weight is not 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from torch import nn

from kdsr.losses.levels import levels_compared, levels_needed
from kdsr.losses.negative_loss import NegativeLoss
from kdsr.models.kd_model import KDModel
from small_runs import complete

Options = dict[str, Any]
SHORT = [1.0, 0.0, 0.5, 0.0, 0.0]
ALMOST_SHORT = [1.0, 0.0, 0.5, 0.0, 1e-30]  # nothing of the sum, but all levels run


def test_levels_that_are_needed() -> None:
    assert [levels_needed(weights) for weights in ([1, 0, 2], [1, 0, 0], [0, 0], [])] == [3, 1, 1, 1]
    assert levels_compared(nn.Sequential(NegativeLoss())) == 3  # by default two weights are 0
    assert levels_compared(nn.L1Loss()) is None


@pytest.mark.parametrize("kind", ["VQGAN", "VGG19"])
def test_the_first_features_are_those_of_a_full_pass(kind: str, dckd_options: Options) -> None:
    net = build_network({"type": "VGG19"} if kind == "VGG19" else dckd_options["network_vqgan"]).eval()
    images = torch.rand(2, 3, 32, 32)
    whole = net(images)
    for levels in range(1, 6):
        part = net(images, levels=levels)
        assert len(part) == levels and all(map(torch.equal, part, whole))
        if kind == "VQGAN":
            assert torch.equal(net.code_logits(part), net.code_logits(whole))


def step_of(
    options: Options, extractor: str, **train: Any
) -> tuple[dict[str, torch.Tensor], list[float], list[int]]:
    """Losses, the student's gradients added up, and images that went through the extractor's last level."""
    options = complete(options)
    options["train"].update(train)
    torch.manual_seed(0)
    model = KDModel(options)
    net = model.networks()[f"net_{extractor}"]
    last = net.encoder.down[-1].block[0] if extractor == "vqgan" else net.features[-1]
    seen: list[int] = []
    last.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    generator = torch.Generator().manual_seed(1)
    lq, gt = (torch.rand(2, 3, side, side, generator=generator) for side in (8, 32))
    model.feed_data({"lq": lq, "gt": gt})
    losses = model.compute_gradients(1)
    gradients = [parameter.grad.sum().item() for parameter in model.net_g.parameters()]
    return losses, gradients, seen


@pytest.mark.parametrize("codes", [False, True])
def test_passes_of_dckd_end_there(dckd_options: Options, codes: bool) -> None:
    """With ``ce_opt`` the student's and the teacher's images go on from there; the six negatives never do."""
    contrast = dckd_options["train"]["cl_opt"]
    changes = {} if codes else {"ce_opt": None}
    short, full = (
        step_of(dckd_options, "vqgan", cl_opt={**contrast, "weights": weights}, **changes)
        for weights in (SHORT, ALMOST_SHORT)
    )
    assert sum(short[2]) == (4 if codes else 0) and sum(full[2]) == 2 + 2 + 6
    assert short[0].keys() == full[0].keys() and ("l_ce" in short[0]) is codes
    for name, loss in full[0].items():
        torch.testing.assert_close(short[0][name], loss, rtol=1e-6, atol=0)
    assert short[1] == pytest.approx(full[1], rel=1e-4)


@pytest.mark.parametrize("term", ["csd_opt", "neg_opt"])
def test_passes_of_vgg19_end_there(teacher_options: Options, term: str) -> None:
    vgg = build_network({"type": "VGG19"})
    torch.save(vgg.state_dict(), "vgg19.pth")
    teacher_options["network_extractor"] = {"type": "VGG19"}
    teacher_options["path"].update(pretrain_network_extractor="vgg19.pth", param_key_extractor=None)
    loss = {"type": "ContrasLoss" if term == "csd_opt" else "NegativeLoss"}
    short, full = (
        step_of(teacher_options, "extractor", **{term: {**loss, "weights": weights}})
        for weights in (SHORT, ALMOST_SHORT)
    )
    assert sum(short[2]) == 0 < sum(full[2])
    for name, value in full[0].items():
        torch.testing.assert_close(short[0][name], value, rtol=1e-6, atol=0)
    assert short[1] == pytest.approx(full[1], rel=1e-4)


def test_a_second_term_that_compares_more_levels(dckd_options: Options) -> None:
    contrast = dckd_options["train"]["cl_opt"]
    train = dckd_options["train"] | {"ce_opt": None, "lcr_opt": None}
    dckd_options["train"] = train | {"csd_opt": {"type": "ContrasLoss", "weights": [1.0] * 5}}
    both = step_of(dckd_options, "vqgan", cl_opt={**contrast, "weights": SHORT})
    dckd_options["train"] = train
    alone = step_of(dckd_options, "vqgan", cl_opt={**contrast, "weights": SHORT})
    torch.testing.assert_close(both[0]["l_cl"], alone[0]["l_cl"])
    assert sum(both[2]) == 2 + 2 + 2  # those of csd_opt
