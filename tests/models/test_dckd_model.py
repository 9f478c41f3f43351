"""DCKDModel against the authors' release, and its own promises."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdsr.deploy.network_file import DESCRIBED
from kdsr.models.dckd_model import DCKDModel
from kdsr.options.check import check
from kdsr.terms.dckd import history_step
from kdsr.tools.plain_step import PlainStep


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def relative_distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    names = [name for name, value in theirs.items() if value.is_floating_point()]
    assert names
    return max(
        float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12)) for name in names
    )


def itself(model: DCKDModel) -> DCKDModel:
    return model


either = pytest.mark.parametrize(
    "steps_of", [itself, PlainStep]
)  # PlainStep: the baseline of kdsr bench step


@either
def test_six_steps_of_the_release(shared: Path, float64: None, steps_of: Any) -> None:
    """The whole method in float64, every draw off: losses to 1e-9, weights of student, EMA and history to 1e-8."""
    golden = torch.load(shared / "golden" / "dckd_steps.pt", weights_only=True)
    model = DCKDModel(golden["options"])
    for name, weights in golden["initial"].items():
        model.networks()[name].load_state_dict(weights)
    steps = steps_of(model)
    for iteration, (batch, losses) in enumerate(zip(golden["batches"], golden["losses"], strict=True), 1):
        model.update_learning_rate(iteration, warmup_iter=-1)
        steps.feed_data(batch)
        steps.optimize_parameters(iteration)
        logged = {name: float(value) for name, value in steps.log_dict.items()}
        assert logged == pytest.approx(losses, rel=1e-9, abs=0)
    for name, weights in golden["final"].items():
        assert relative_distance(model.networks()[name].state_dict(), weights) < 1e-8, name


def fill(net: nn.Module, shift: float) -> None:
    """Sets every parameter to a sine over its elements; the phase depends on ``shift`` and the name's rank."""
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for rank, name in enumerate(sorted(parameters)):
            parameter = parameters[name]
            element = torch.arange(1, parameter.numel() + 1)
            wave = torch.sin(0.37 * element * (1 + 0.01 * rank) + 0.1 * rank + shift).view(parameter.shape)
            if parameter.dim() > 1:
                fan_in = 4 if name.endswith("embedding.weight") else parameter[0].numel()
                parameter.copy_(wave * math.sqrt(2.0 / fan_in))
            else:
                parameter.copy_(0.1 * wave + (1 if name.endswith("weight") else 0))


def pictures(scale: int, phase: float) -> Tensor:
    """Two images of smooth waves, (2, 3, 16·scale, 16·scale) in [0, 1]."""
    side = torch.arange(16 * scale) / scale
    y, x = side[None, None, :, None], side[None, None, None, :]
    sample, channel = torch.arange(2).view(2, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1)
    rows = torch.sin(0.9 * y * (1 + 0.2 * channel) + 1.1 * sample + phase)
    return 0.5 + 0.25 * rows + 0.25 * torch.cos(0.7 * x + 0.4 * channel + 0.5 * phase)


@either
def test_six_steps_of_the_release_from_formulas(float64: None, steps_of: Any) -> None:
    """As above, with weights and images that are formulas, so that the vectors can be shipped with the tests."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "dckd_tiny.json").read_text())
    model = DCKDModel(golden["options"])
    shifts = {"net_g": 0.0, "net_g_ema": 0.2, "net_t": 0.5, "net_his": 0.9, "net_vqgan": 0.0}
    for name, shift in shifts.items():
        fill(model.networks()[name], shift)
    steps = steps_of(model)
    for iteration, losses in enumerate(golden["losses"], 1):
        model.update_learning_rate(iteration, warmup_iter=-1)
        steps.feed_data({"lq": pictures(1, 0.7 * iteration), "gt": pictures(2, 0.7 * iteration)})
        steps.optimize_parameters(iteration)
        logged = {name: float(value) for name, value in steps.log_dict.items()}
        assert logged == pytest.approx(losses, rel=1e-11, abs=0)
    for name, norms in golden["final"].items():
        parameters = {key: value.detach() for key, value in model.networks()[name].named_parameters()}
        assert parameters.keys() == norms.keys()
        for key, (norm, total) in norms.items():
            found = float(parameters[key].norm()), float(parameters[key].abs().sum())
            assert found == pytest.approx((norm, total), rel=1e-11), f"{name}.{key}"


@pytest.fixture
def model(dckd_options: dict[str, Any]) -> DCKDModel:
    dckd_options.update(num_gpu=0, dist=False, rank=0, world_size=1, is_train=True)
    torch.manual_seed(0)
    return DCKDModel(dckd_options)


def batch(samples: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lq = torch.rand(samples, 3, 8, 8, generator=generator)
    return {"lq": lq, "gt": lq.repeat_interleave(4, 2).repeat_interleave(4, 3)}


def step(model: DCKDModel, iteration: int) -> None:
    model.feed_data(batch())
    model.optimize_parameters(iteration)


def test_all_five_losses_are_logged_and_finite(model: DCKDModel) -> None:
    step(model, 1)
    log = model.get_current_log()
    assert list(log) == ["l_pix", "l_ts", "l_lcr", "l_cl", "l_ce"]
    assert all(value == value and 0 < value < 100 for value in log.values())


def test_only_the_student_learns(model: DCKDModel) -> None:
    frozen = {name: model.networks()[name] for name in ("net_t", "net_vqgan", "net_his")}
    before = {name: copy.deepcopy(net.state_dict()) for name, net in frozen.items()}
    student = copy.deepcopy(model.net_g.state_dict())
    step(model, 1)
    for name, net in frozen.items():
        assert not net.training, name
        assert not any(
            parameter.requires_grad or parameter.grad is not None for parameter in net.parameters()
        )
        assert relative_distance(net.state_dict(), before[name]) == 0
    assert relative_distance(model.net_g.state_dict(), student) > 0
    assert not model.step.teacher_output.requires_grad


def test_each_loss_of_the_method_moves_the_student(model: DCKDModel) -> None:
    model.feed_data(batch())
    losses = model.forward_step(1)
    for name in ("l_ts", "l_lcr", "l_cl", "l_ce"):
        gradient = torch.autograd.grad(losses[name], model.net_g.conv_last.weight, retain_graph=True)[0]
        assert gradient.abs().sum() > 0, name


def test_history_follows_every_second_step(model: DCKDModel) -> None:
    start = copy.deepcopy(model.networks()["net_his"].state_dict())
    step(model, 1)
    assert relative_distance(model.networks()["net_his"].state_dict(), start) == 0
    step(model, 2)
    expected = {name: 0.1 * start[name] + 0.9 * value for name, value in model.net_g_ema.named_parameters()}
    assert relative_distance(model.networks()["net_his"].state_dict(), expected) < 1e-6


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [(1, 1000), (100_000, 1000), (100_001, 2000), (300_000, 3000), (300_001, 3000), (10**7, 3000)],
)
def test_history_schedule_holds_its_last_value(iteration: int, expected: int) -> None:
    assert history_step([1000, 2000, 3000], iteration) == expected
    assert history_step(500, iteration) == 500


def test_chunks_give_the_same_features(model: DCKDModel) -> None:
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    vqgan = model.networks()["net_vqgan"]
    model.feed_data(batch())
    whole, parts = model.begin_step(1), model.begin_step(1)
    torch.testing.assert_close(parts.extract(vqgan, images, chunk=2), whole.extract(vqgan, images, chunk=5))
    torch.testing.assert_close(parts.code_logits(vqgan, images), whole.code_logits(vqgan, images))


def test_negatives_are_degraded_copies_and_the_clean_input(model: DCKDModel) -> None:
    model.feed_data(batch())
    contrast, now = model.terms["cl_opt"], model.begin_step(1)
    negatives = contrast.negatives(now)
    clean = model.networks()["net_his"](model.lq)
    assert negatives.shape == (3 * 2, 3, 32, 32)
    torch.testing.assert_close(negatives[4:], clean)
    assert (negatives[:2] - clean).abs().mean() > 1e-4
    contrast.options = replace(contrast.options, clean_negative=False)
    assert contrast.negatives(now).shape[0] == 2 * 2


def test_a_saved_state_goes_on_with_the_same_bits(
    model: DCKDModel, dckd_options: dict[str, Any], tmp_path: Path
) -> None:
    dckd_options["path"].update(
        models=str(tmp_path), training_states=str(tmp_path), experiments_root=str(tmp_path)
    )
    for iteration in (1, 2, 3):
        step(model, iteration)
    model.save(0, 3)
    step(model, 4)

    torch.manual_seed(99)
    resumed = DCKDModel(dckd_options)
    resumed.resume_training(torch.load(tmp_path / "3.state", weights_only=True))
    step(resumed, 4)
    for name in ("net_g", "net_g_ema", "net_his"):
        ours, theirs = resumed.networks()[name].state_dict(), model.networks()[name].state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_the_students_file_holds_the_student_alone(
    model: DCKDModel, dckd_options: dict[str, Any], tmp_path: Path
) -> None:
    dckd_options["path"].update(models=str(tmp_path), training_states=str(tmp_path))
    model.save(0, 1)
    saved = torch.load(tmp_path / "net_g_1.pth", weights_only=True)
    assert set(saved) - DESCRIBED == {"params", "params_ema"}
    assert set(saved["params"]) == set(model.net_g.state_dict())


def test_inconsistent_options(dckd_options: dict[str, Any]) -> None:
    assert DCKDModel.check_options(dckd_options) == []
    dckd_options["network_vqgan"] = None
    dckd_options["train"].update(num_neg=0, clean_negative=False, step=[1, 0], history_source="teacher")
    problems = check(dckd_options, True)
    assert {problem.split(":")[0] for problem in problems} == {
        "network_vqgan", "train.num_neg", "train.step.1", "train.history_source",
    }  # fmt: skip
