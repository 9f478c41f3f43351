"""FitNet, AT, FAKD and RKD in a model: each from its parts, what its gradient reaches, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ranks
from kdsr.losses.affinity_loss import affinity_distance
from kdsr.losses.attention_loss import attention_distance
from kdsr.losses.fitnet_loss import feature_distance
from kdsr.losses.relation_loss import RKDLoss
from kdsr.models.kd_model import KDModel
from small_runs import complete, run, seen

Options = dict[str, Any]
TERMS = {
    "fitnet_opt": {"type": "FitNetLoss", "loss_weight": 0.5},
    "at_opt": {"type": "AttentionTransferLoss", "loss_weight": 0.5},
    "fakd_opt": {"type": "AffinityLoss", "loss_weight": 0.5},
    "rkd_opt": {"type": "RKDLoss", "loss_weight": 0.5},
}
LOGGED = {key: f"l_{key.removesuffix('_opt')}" for key in TERMS}
PAIRS = [{"student": "body.0", "teacher": "body.1"}, {"student": "conv_first", "teacher": "conv_first"}]


@pytest.fixture
def options(teacher_options: Options) -> Options:
    teacher_options["datasets"]["train"].update(batch_size_per_gpu=3, gt_size=32)
    teacher_options["train"]["taps"] = PAIRS
    return teacher_options


def only(options: Options, key: str) -> Options:
    """A model's options with no other loss than that of one term."""
    options = copy.deepcopy(options)
    options["train"].update({"pixel_opt": None, key: dict(TERMS[key])})
    return complete(options)


def stepped(options: Options) -> tuple[KDModel, dict[str, torch.Tensor]]:
    """A model after one backward pass, and its losses."""
    torch.manual_seed(2)
    model = KDModel(options)
    model.feed_data({"lq": torch.rand(3, 3, 8, 8), "gt": torch.rand(3, 3, 32, 32)})
    return model, model.compute_gradients(1)


@pytest.mark.parametrize("key", TERMS)
def test_a_term_is_its_loss_on_the_tapped_features(options: Options, key: str) -> None:
    model, losses = stepped(only(options, key))
    ours = seen(model.net_g, model.lq, *(pair["student"] for pair in PAIRS))
    theirs = seen(model.net_t, model.lq, *(pair["teacher"] for pair in PAIRS))
    if key == "fitnet_opt":
        adapters = model.student_bundle.adapters["fitnet"]
        adapted = [adapter(feature) for adapter, feature in zip(adapters.children(), ours, strict=True)]
        assert [feature.shape[1] for feature in adapted] == [12, 12]
        expected = feature_distance(adapted, theirs)
    else:
        assert [feature.shape[1] for feature in ours] == [8, 8]
        loss = {"at_opt": attention_distance, "fakd_opt": affinity_distance, "rkd_opt": RKDLoss()}[key]
        expected = loss(ours, theirs)
    assert list(losses) == [LOGGED[key]]
    torch.testing.assert_close(losses[LOGGED[key]], 0.5 * expected)
    assert float(expected.detach()) > 0


@pytest.mark.parametrize("key", TERMS)
def test_gradient_reaches_student_and_adapters_and_no_teacher(options: Options, key: str) -> None:
    model, _ = stepped(only(options, key))
    gradients = {name: p.grad for name, p in model.bundle.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for name in ("student.conv_first.weight", "student.body.0.conv1.weight"):
        assert gradients[name].abs().sum() > 0
    assert "student.conv_last.weight" not in gradients  # above the taps
    adapters = [name for name in gradients if name.startswith("adapters.")]
    assert len(adapters) == (4 if key == "fitnet_opt" else 0)
    assert all(gradients[name].abs().sum() > 0 for name in adapters)
    assert len(list(model.net_g.parameters())) + len(adapters) == len(list(model.bundle.parameters()))
    assert all(p.grad is None and not p.requires_grad for p in model.net_t.parameters())


@pytest.mark.parametrize("key", TERMS)
def test_half_precision_and_another_memory_layout_change_little(options: Options, key: str) -> None:
    """What is compared is computed in float32, from features in bf16."""
    _, plain = stepped(only(options, key))
    options["precision"] = {"amp": "bf16", "channels_last": True}
    model, losses = stepped(only(options, key))
    value = losses[LOGGED[key]]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, plain[LOGGED[key]], rtol=0.05, atol=1e-3)
    gradients = [p.grad for p in model.bundle.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_features_of_another_size_are_resized_to_the_teachers(options: Options) -> None:
    """The student's are taken behind its first upsampling, twice as large as the teacher's."""
    options["train"]["taps"] = [{"student": "upsample.1", "teacher": "body.1"}]
    for key in ("at_opt", "fakd_opt", "rkd_opt"):
        _, losses = stepped(only(options, key))
        assert losses[LOGGED[key]].isfinite() and float(losses[LOGGED[key]].detach()) > 0


def test_all_of_them_train_together_and_the_form_of_the_affinity_is_logged_once(
    options: Options,
) -> None:
    options["train"].update(copy.deepcopy(TERMS), total_iter=2)
    options["train"]["fakd_opt"]["max_positions"] = 20
    options["logger"]["save_checkpoint_freq"] = 2
    assert run(options) == 0
    message = next(Path("experiments/run").glob("train_*.log")).read_text(encoding="utf-8")
    assert all(message.count(f"{name}: ") == 2 for name in LOGGED.values())
    assert message.count("train.fakd_opt: affinity pooled to 4x4 of 8x8 positions") == 1
    state = torch.load("experiments/run/training_states/2.state", weights_only=True)["networks"]
    assert len(state["adapters"]) == 4 and "fitnet" in next(iter(state["adapters"]))
    student = torch.load("experiments/run/models/net_g_2.pth", weights_only=True)["params"]
    assert student.keys() == state["net_g"].keys()


@pytest.mark.parametrize("key", TERMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"taps": None}}, "train.taps: missing, train.{key} needs it; add"),
        ({"train": {"taps": [{"student": "body.0"}]}}, "train.taps.0: "),
        ({"train": {"taps": [{"student": "bdy.0", "teacher": "body.1"}]}}, "did you mean body.0"),
        ({"network_t": None, "path": {}}, "train.{key}: needs a teacher"),
        (
            {"train": {"{key}": {"type": "L1Loss"}}},
            "train.{key}.type: L1Loss is not a loss of this term",
        ),
    ],
    ids=["no taps", "half a pair", "no such module", "no teacher", "another loss"],
)
def test_options_that_cannot_be_run(
    options: Options, key: str, change: Options, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options["train"][key] = dict(TERMS[key])
    for section, values in change.items():
        if section == "train":
            options["train"].update({name.format(key=key): value for name, value in values.items()})
        else:
            options[section] = values
    assert run(options) == 2
    assert message.format(key=key) in capsys.readouterr().err
    assert not Path("experiments").exists()


def test_relations_need_three_samples(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    options["train"]["rkd_opt"] = dict(TERMS["rkd_opt"])
    options["datasets"]["train"]["batch_size_per_gpu"] = 2
    assert run(options) == 2
    message = capsys.readouterr().err
    assert (
        "train.rkd_opt: compares at least 3 samples of a batch; datasets.train.batch_size_per_gpu is 2"
        in message
    )


def test_an_affinity_that_cannot_be(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    options["train"]["fakd_opt"] = {**TERMS["fakd_opt"], "max_positions": 0, "reduce": "max"}
    assert run(options) == 2
    assert "AffinityLoss: reduce 'max' is unknown" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_whose_student_has_parts_without_gradient(options: Options, tmp_path: Path) -> None:
    """With find_unused_parameters, adapters count as used although the output does not depend on them."""
    options["network_g"]["type"] = "EDSRWithRest"
    options["find_unused_parameters"] = True
    options["datasets"]["train"]["batch_size_per_gpu"] = 1
    options["train"].update(fitnet_opt=dict(TERMS["fitnet_opt"]), zoom_out_opt={"type": "L1Loss"})
    (tmp_path / "run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert ranks.run(tmp_path, ["-opt", "run.yml"], prepare=_with_rest) == [0, 0]


def _with_rest(rank: int) -> None:
    from basicsr.archs.edsr_arch import EDSR
    from basicsr.utils.registry import ARCH_REGISTRY

    class EDSRWithRest(EDSR):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.rest = torch.nn.Linear(2, 2)

    ARCH_REGISTRY.register(EDSRWithRest)
