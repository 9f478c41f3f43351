"""PSNRLoss: the negative PSNR of each image, averaged."""

from __future__ import annotations

import pytest
import torch
from basicsr.losses import build_loss
from torch.autograd import gradcheck

from kdsr.losses.psnr_loss import PSNRLoss, negative_psnr
from kdsr.runtime.errors import OptionError


def test_value_by_hand() -> None:
    target = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    pred = target.clone()
    pred[0] += 0.1  # MSE 0.01: 20 dB
    pred[1] += 0.01  # 1e-4: 40 dB
    assert negative_psnr(pred, target).item() == pytest.approx(-30, abs=1e-3)
    assert negative_psnr(target, target).item() == pytest.approx(-80)  # 10 log10(1e-8)
    loss = build_loss({"type": "PSNRLoss", "loss_weight": 0.5, "reduction": "mean"})
    assert loss(pred, target).item() == pytest.approx(-15, abs=1e-3)


def test_the_luma_alone() -> None:
    """Blue by 0.1: Y = 24.966 * 0.1 / 255 away."""
    target = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    pred = target.clone()
    pred[:, 2] = 0.1
    assert PSNRLoss(toY=True)(pred, target).item() == pytest.approx(-40.184, abs=1e-3)
    assert PSNRLoss()(pred, target).item() == pytest.approx(-24.771, abs=1e-3)  # 0.01 / 3


@pytest.mark.parametrize("luma", [False, True])
def test_gradient(luma: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.rand(2, 3, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    assert gradcheck(lambda x: PSNRLoss(2.0, toY=luma)(x, target), pred.requires_grad_())


def test_other_reductions_are_refused() -> None:
    with pytest.raises(OptionError, match="reduction 'sum' is unknown; it can be mean"):
        PSNRLoss(reduction="sum")
