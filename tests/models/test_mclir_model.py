"""MCLIRModel: its loss from the parts, how the negative models follow, and what is refused at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdsr.losses.contrastive_loss import contrastive_ratio
from kdsr.losses.negative_loss import distance_to_negatives
from kdsr.models.mclir_model import MCLIRModel
from small_runs import complete, run

Options = dict[str, Any]
WEIGHTS = [0.2, 0.3, 0.5, 0.0, 0.0]


@pytest.fixture
def options(dckd_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """No teacher, two negative models, the small VQGAN as the extractor."""
    monkeypatch.chdir(tmp_path)
    run = dckd_options
    run["model_type"] = "MCLIRModel"
    run["network_extractor"] = run.pop("network_vqgan")
    del run["network_his"], run["network_t"]
    run["path"] = {"pretrain_network_extractor": "vqgan.ckpt", "param_key_extractor": "state_dict"}
    run["datasets"]["train"]["gt_size"] = 32
    run["train"] = {
        key: run["train"][key] for key in ("optim_g", "scheduler", "total_iter", "pixel_opt", "ema_decay")
    }
    run["train"].update(
        neg_opt={"type": "NegativeLoss", "loss_weight": 0.5}, neg_iter=[2, 3], neg_decay=[0.1, 0.4]
    )
    return run


def stepped(model: MCLIRModel, samples: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    model.feed_data({"lq": torch.rand(samples, 3, 8, 8), "gt": torch.rand(samples, 3, 32, 32)})
    return model.compute_gradients(1)


def weights(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def test_the_loss_is_minus_the_distance_to_the_negatives(options: Options) -> None:
    model = MCLIRModel(complete(options))
    losses = stepped(model)
    extractor = model.networks()["net_extractor"]
    negatives = torch.cat([net(model.lq) for net in model.networks()["net_neg"]])
    distance = distance_to_negatives(extractor(model.output), extractor(negatives), WEIGHTS)
    assert set(losses) == {"l_pix", "l_neg"} and float(distance.detach()) > 0
    torch.testing.assert_close(losses["l_neg"], -0.5 * distance)
    assert all(parameter.grad.isfinite().all() for parameter in model.net_g.parameters())
    for frozen in (model.networks()["net_neg"], extractor):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert not any(net.training for net in (*model.networks()["net_neg"], extractor))


def test_the_ratio_has_y_as_its_positive(options: Options) -> None:
    options["train"]["neg_opt"] = {"type": "ContrasLoss", "loss_weight": 0.5}
    model = MCLIRModel(complete(options))
    losses = stepped(model)
    extractor = model.networks()["net_extractor"]
    seen = [extractor(images) for images in (model.output, model.gt)]
    negatives = extractor(torch.cat([net(model.lq) for net in model.networks()["net_neg"]]))
    expected = contrastive_ratio(*seen, negatives, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0))
    torch.testing.assert_close(losses["l_neg"], 0.5 * expected)
    assert MCLIRModel.keys_with_gt(options["train"])["neg_opt"] == "use NegativeLoss"


def test_the_loss_alone_leads_away_from_the_negatives(options: Options) -> None:
    options["train"]["neg_iter"] = 1000
    del options["train"]["pixel_opt"], options["train"]["neg_decay"]
    model = MCLIRModel(complete(options))
    distances = [float(stepped(model)["l_neg"].detach())]
    for iteration in range(1, 4):
        model.optimize_parameters(iteration)
        distances.append(float(model.log_dict["l_neg"]))
    assert distances[-1] < distances[0] < 0


def test_negative_models_begin_near_the_student_and_follow_it(options: Options) -> None:
    model = MCLIRModel(complete(options))
    first, second = model.networks()["net_neg"]
    student = weights(model.net_g)
    for net in (first, second):  # a tenth of another random network
        assert 0 < float((weights(net) - student).norm()) < 0.2 * float(student.norm())
    assert not torch.equal(weights(first), weights(second))
    with torch.no_grad():
        for parameter in model.net_g.parameters():
            parameter.add_(1.0)
    student, before = weights(model.net_g), [weights(first), weights(second)]
    follow = model.terms["neg_opt"].after_step
    model.feed_data({"lq": torch.rand(1, 3, 8, 8)})
    follow(model.begin_step(1))
    assert torch.equal(weights(first), before[0]) and torch.equal(weights(second), before[1])
    follow(model.begin_step(2))
    torch.testing.assert_close(weights(first), 0.1 * before[0] + 0.9 * student)
    assert torch.equal(weights(second), before[1])
    follow(model.begin_step(3))
    torch.testing.assert_close(weights(second), 0.4 * before[1] + 0.6 * student)


def test_a_start_of_0_is_the_student(options: Options) -> None:
    options["train"]["neg_start"] = 0
    model = MCLIRModel(complete(options))
    assert all(torch.equal(weights(net), weights(model.net_g)) for net in model.networks()["net_neg"])


def test_negative_models_are_in_the_state_and_not_in_the_students_file(options: Options) -> None:
    options["train"]["neg_iter"], options["train"]["neg_decay"] = 2, 0.1
    options["logger"]["save_checkpoint_freq"] = 3
    assert run(options) == 0
    state = torch.load("experiments/run/training_states/3.state", weights_only=True)["networks"]
    assert set(state) == {"net_g", "net_g_ema", "net_neg"}
    student = torch.load("experiments/run/models/net_g_3.pth", weights_only=True)["params"]
    assert student.keys() == state["net_g"].keys()
    assert {name.removeprefix("0.") for name in state["net_neg"]} == set(student)


def test_a_teacher_may_be_there(options: Options, tmp_path: Path) -> None:
    options["network_t"] = {**options["network_g"], "num_feat": 12, "num_block": 2}
    options["path"]["pretrain_network_t"] = "teacher.pth"
    options["train"]["logits_opt"] = dict(options["train"]["pixel_opt"])
    assert set(stepped(MCLIRModel(complete(options)))) == {"l_pix", "l_ts", "l_neg"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_extractor": None}, "network_extractor: missing, train.neg_opt compares its features"),
        ({"path": {}}, "path.pretrain_network_extractor: missing"),
        ({"neg_opt": None}, "train.neg_opt"),
        ({"neg_opt": {"type": "FACDLoss"}}, "train.neg_opt.type: FACDLoss is not a loss of this"),
        (
            {"neg_opt": {"type": "NegativeLoss", "weights": [1]}},
            "5 levels of features and the loss has 1 weights",
        ),
        ({"neg_iter": 0}, "train.neg_iter: 0 is below 1"),
        ({"neg_iter": [2, "3"]}, "train.neg_iter.1: expected a whole number, got the text '3'"),
        ({"neg_decay": 1.5}, "train.neg_decay: 1.5 is above 1"),
        ({"neg_decay": [0.1, 0.1, 0.1]}, "train.neg_decay: 3 entries for 2 negative models"),
        ({"neg_start": 2}, "train.neg_start: 2 is above 1"),
    ],
)
def test_options_that_cannot_be_run(
    options: Options, change: Options, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in change.items():
        (options["train"] if key.startswith("neg_") else options)[key] = value
    assert run(options) == 2
    assert message in capsys.readouterr().err
    assert not Path("experiments").exists()


def test_the_ratio_without_ground_truth(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    train = options["datasets"]["train"]
    train["type"] = "LQImageDataset"
    del train["dataroot_gt"], options["train"]["pixel_opt"]
    options["train"]["neg_opt"] = {"type": "ContrasLoss"}
    assert run(options) == 2
    assert "train.neg_opt: needs ground truth" in (message := capsys.readouterr().err)
    assert "use NegativeLoss, or use a paired set" in message
