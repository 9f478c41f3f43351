"""Mixup: one share and one order for LQ and GT of a batch, from the generator of the training state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdsr.distill.mixup import MixingOptions, mixed
from kdsr.models.kd_model import KDModel
from small_runs import complete


def shares(options: MixingOptions, count: int) -> torch.Tensor:
    """The shares of the first image, of batches of an image of ones and one of zeros; -1: not mixed."""
    generator = torch.Generator().manual_seed(0)
    lq = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    gt = 10 * lq.expand(2, 3, 4, 4)
    found = []
    for _ in range(count):
        mixed_lq, mixed_gt = mixed(lq, gt, options, generator)
        assert mixed_gt is not None
        torch.testing.assert_close(mixed_gt, (10 * mixed_lq).expand_as(gt))
        # by hand: with the order (1, 0) the batch (1, 0) becomes (s, 1 - s), with (0, 1) it stays
        torch.testing.assert_close(mixed_lq.sum(), torch.tensor(1.0))
        found.append(-1.0 if torch.equal(mixed_lq, lq) else mixed_lq[0].item())
    return torch.tensor(found)


def test_shares_are_those_of_the_beta_distribution() -> None:
    found = shares(MixingOptions(mixup=True, mixup_beta=1.2), 4000)
    drawn = found[found >= 0]
    assert len(drawn) / len(found) == pytest.approx(
        0.5, abs=0.03
    )  # the order of two is the same every second time
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * 1.2 + 1)), abs=0.005)


def test_every_second_batch_stays() -> None:
    found = shares(MixingOptions(mixup=True, use_identity=True), 4000)
    assert (found >= 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_student_and_teacher_see_the_mixed_images(teacher_options: dict[str, Any]) -> None:
    teacher_options["train"] |= {"mixing_augs": {"mixup": True}, "logits_opt": {"type": "L1Loss"}}
    model = KDModel(complete(teacher_options))
    generator = torch.Generator().manual_seed(1)
    lq = torch.rand(4, 3, 8, 8, generator=generator)
    gt = torch.rand(4, 3, 32, 32, generator=generator)
    state = model.generator.get_state()
    model.feed_data({"lq": lq, "gt": gt})
    losses = model.forward_step(1)
    model.generator.set_state(state)
    lq, gt = mixed(lq, gt, MixingOptions(mixup=True), model.generator)
    assert not torch.equal(lq, model.lq)
    with torch.no_grad():
        student, teacher = model.net_g(lq), model.net_t(lq)
    torch.testing.assert_close(losses["l_pix"], (student - gt).abs().mean())
    torch.testing.assert_close(losses["l_ts"], (student - teacher).abs().mean())


def test_nothing_is_drawn_where_it_is_off(run_options: dict[str, Any]) -> None:
    run_options["train"]["mixing_augs"] = {"mixup": False, "use_identity": True}
    model = KDModel(complete(run_options))
    before = model.generator.get_state()
    model.feed_data({"lq": torch.rand(2, 3, 8, 8), "gt": torch.rand(2, 3, 32, 32)})
    model.forward_step(1)
    assert model.step.lq is model.lq and torch.equal(model.generator.get_state(), before)
