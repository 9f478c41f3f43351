"""KDModel: response distillation, label consistency, scratch, test mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdsr.models.kd_model import KDModel


def make(options: dict[str, Any], is_train: bool = True) -> KDModel:
    options.update(num_gpu=0, dist=False, rank=0, world_size=1, is_train=is_train)
    torch.manual_seed(0)
    return KDModel(options)


@pytest.fixture
def kd_options(dckd_options: dict[str, Any]) -> dict[str, Any]:
    dckd_options["model_type"] = "KDModel"
    return dckd_options


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "lq": torch.rand(3, 3, 8, 8, generator=generator),
        "gt": torch.rand(3, 3, 32, 32, generator=generator),
    }


def test_losses_are_l1_to_truth_teacher_and_second_view(
    kd_options: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    for key in ("cl_opt", "ce_opt"):
        kd_options["train"][key] = None
    model = make(kd_options)
    model.feed_data(batch)
    state = model.generator.get_state()
    losses = model.forward_step(1)
    with torch.no_grad():
        teacher = model.net_t(batch["lq"])
        model.generator.set_state(state)
        augmentation = model.terms["lcr_opt"].augmentation
        plan = augmentation.draw(3, model.generator)
        view = augmentation.invert(model.net_t(augmentation.apply(batch["lq"], plan)), plan)
    expected = {
        "l_pix": (model.output - batch["gt"]).abs().mean(),
        "l_ts": (model.output - teacher).abs().mean(),
        "l_lcr": (model.output - view).abs().mean(),
    }
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)
    assert (view - teacher).abs().mean() > 1e-4  # the second view is a second opinion


def test_scratch_is_a_kd_model_without_a_teacher(
    run_options: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    model = make(run_options)
    model.feed_data(batch)
    model.optimize_parameters(1)
    assert list(model.get_current_log()) == ["l_pix"]
    assert model.net_t is None


def test_a_loss_without_its_teacher_is_refused(kd_options: dict[str, Any]) -> None:
    kd_options["network_t"] = None
    problems = KDModel.check_options(kd_options)
    assert {"train.logits_opt", "train.lcr_opt"} <= {problem.split(":")[0] for problem in problems}


def test_mode_builds_only_the_student_and_takes_its_ema(kd_options: dict[str, Any], tmp_path: Any) -> None:
    trained = make(kd_options)
    trained.opt["path"].update(models=str(tmp_path), training_states=str(tmp_path))
    for parameter in trained.net_g_ema.parameters():
        parameter.add_(1.0)
    trained.save(0, -1)
    kd_options["path"]["pretrain_network_g"] = str(tmp_path / "net_g_latest.pth")
    model = make(kd_options, is_train=False)
    assert model.net_t is None and not hasattr(model, "net_g_ema")
    ours, ema = model.net_g.state_dict(), trained.net_g_ema.state_dict()
    assert all(torch.equal(ours[name], ema[name]) for name in ema)


@pytest.mark.parametrize(
    "optimizer", [{"type": "AdamW", "lr": 1e-3}, {"type": "SGD", "lr": 1e-2, "momentum": 0.9}]
)
def test_any_optimizer_of_torch(
    run_options: dict[str, Any], batch: dict[str, Tensor], optimizer: dict[str, Any]
) -> None:
    run_options["train"]["optim_g"] = optimizer
    model = make(run_options)
    losses = []
    for iteration in range(1, 9):
        model.feed_data(batch)
        model.optimize_parameters(iteration)
        losses.append(model.get_current_log()["l_pix"])
    assert type(model.optimizer_g).__name__ == optimizer["type"]
    assert losses[-1] < losses[0]


def test_bf16_keeps_weights_and_losses_in_float32(
    kd_options: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    full = make(kd_options)
    kd_options["precision"] = {"amp": "bf16", "channels_last": True}
    reduced = make(kd_options)
    for model in (full, reduced):
        model.feed_data(batch)
        model.optimize_parameters(1)
    exact, rounded = full.get_current_log(), reduced.get_current_log()
    assert rounded != exact  # it did compute in bf16
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert {value.dtype for value in reduced.log_dict.values()} == {torch.float32}
    assert {parameter.dtype for parameter in reduced.net_g.parameters()} == {torch.float32}
