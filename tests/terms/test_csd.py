"""CSD's contrast in a model: its negatives, its extractors, what the gradient reaches, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from basicsr.archs import build_network

from kdsr.losses.contrastive_loss import contrastive_ratio
from kdsr.models.dckd_model import DCKDModel
from kdsr.models.kd_model import KDModel
from kdsr.runtime.errors import OptionError
from kdsr.terms.csd import following
from small_runs import complete, run

Options = dict[str, Any]
WEIGHTS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0]


@pytest.fixture
def options(dckd_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """A KDModel whose one loss is CSD's, through the small VQGAN."""
    monkeypatch.chdir(tmp_path)
    run = dckd_options
    run["model_type"] = "KDModel"
    run["network_extractor"] = run.pop("network_vqgan")
    del run["network_his"]
    run["path"] = {
        "pretrain_network_t": "teacher.pth",
        "pretrain_network_extractor": "vqgan.ckpt",
        "param_key_extractor": "state_dict",
    }
    run["datasets"]["train"].update(batch_size_per_gpu=3, gt_size=32)
    run["train"] = {key: run["train"][key] for key in ("optim_g", "scheduler", "total_iter")}
    run["train"]["csd_opt"] = {"type": "ContrasLoss", "loss_weight": 0.5}
    return run


def stepped(model: KDModel, samples: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    model.feed_data({"lq": torch.rand(samples, 3, 8, 8), "gt": torch.rand(samples, 3, 32, 32)})
    return model.compute_gradients(1)


@pytest.mark.parametrize("count", [1, 3])
def test_negatives_are_the_samples_that_follow(count: int) -> None:
    samples = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    rows = following(samples, count)
    assert rows.shape == (count, 4, 2, 3, 3)
    expected = [[1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]][:count]
    assert rows[:, :, 0, 0, 0].tolist() == expected


@pytest.mark.parametrize("count", [None, 1])
def test_the_term_is_the_ratio_of_its_parts(options: Options, count: int | None) -> None:
    options["train"]["csd_negatives"] = count
    model = KDModel(complete(options))
    losses = stepped(model)
    blurred = F.interpolate(model.lq, (32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    extractor = model.terms["csd_opt"].extractor
    anchor, positive = extractor(model.net_g(model.lq)), extractor(model.net_t(model.lq))
    shifts = [1] if count else [1, 2]
    negatives = extractor(torch.cat([blurred.roll(-shift, 0) for shift in shifts]))
    expected = contrastive_ratio(anchor, positive, negatives, WEIGHTS)
    assert list(losses) == ["l_csd"] and float(expected.detach()) > 0
    torch.testing.assert_close(losses["l_csd"], 0.5 * expected)


def test_gradient_reaches_the_student_and_no_frozen_network(options: Options) -> None:
    model = KDModel(complete(options))
    stepped(model)
    gradients = [parameter.grad for parameter in model.net_g.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0
    for frozen in (model.net_t, model.terms["csd_opt"].extractor):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
        assert not frozen.training


def test_vgg19_trains(options: Options) -> None:
    torch.manual_seed(3)
    torch.save(build_network({"type": "VGG19"}).state_dict(), "vgg19.pth")
    options["network_extractor"] = {"type": "VGG19"}
    options["path"].update(
        pretrain_network_extractor="vgg19.pth", strict_load_extractor=False, param_key_extractor="auto"
    )
    options["train"].update(total_iter=2, csd_negatives=2)
    options["logger"]["save_checkpoint_freq"] = 2
    assert run(options) == 0
    log = next(Path("experiments/run").glob("train_*.log")).read_text(encoding="utf-8")
    values = [float(value) for value in re.findall(r"l_csd: (\S+)", log)]
    assert len(values) == 2 and all(0 < value < 100 for value in values)
    saved = torch.load("experiments/run/training_states/2.state", weights_only=True)["networks"]
    assert set(saved) == {"net_g"}  # extractors are never saved


def test_a_models_own_vqgan_serves(
    dckd_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dckd_options["train"]["csd_opt"] = {"type": "ContrasLoss", "loss_weight": 0.5}
    model = DCKDModel(complete(dckd_options))
    losses = stepped(model)
    assert model.terms["csd_opt"].extractor is model.networks()["net_vqgan"]
    assert {"l_csd", "l_cl", "l_ce"} <= set(losses) and losses["l_csd"].isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_extractor": None}, "network_extractor: missing, train.csd_opt compares its features"),
        ({"path": {"pretrain_network_t": "teacher.pth"}}, "path.pretrain_network_extractor: missing"),
        ({"batch": 1}, "train.csd_opt: compares a sample with the inputs of the others of its batch"),
        ({"csd_negatives": 3}, "set it to 4 or more"),
        ({"csd_negatives": 0}, "train.csd_negatives: 0 is below 1"),
        (
            {"csd_opt": {"type": "FACDLoss"}},
            "train.csd_opt.type: FACDLoss is not a loss of this term",
        ),
        (
            {"csd_opt": {"type": "ContrasLoss", "weights": [1.0]}},
            "gives 5 levels of features and the loss has 1 weights",
        ),
    ],
    ids=["no extractor", "no weights", "batch", "negatives", "none", "another loss", "levels"],
)
def test_options_that_cannot_be_run(
    options: Options, change: Options, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in change.items():
        if key == "batch":
            options["datasets"]["train"]["batch_size_per_gpu"] = value
        elif key.startswith("csd"):
            options["train"][key] = value
        else:
            options[key] = value
    assert run(options) == 2
    assert message in capsys.readouterr().err


def test_an_extractor_that_is_none(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    options["network_extractor"] = options["network_t"]
    options["path"].update(pretrain_network_extractor="teacher.pth", param_key_extractor="params")
    assert run(options) == 2
    assert "network_extractor: EDSR gives no list of feature maps" in capsys.readouterr().err


def test_a_batch_that_is_smaller_than_the_options_say(options: Options) -> None:
    with pytest.raises(OptionError, match="set it to 2 or more"):
        stepped(KDModel(complete(options)), samples=1)
