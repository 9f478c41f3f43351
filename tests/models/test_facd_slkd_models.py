"""FACDModel and SLKDModel: their terms from the parts, what the gradient reaches, and what is refused at the start."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.archs import build_network

import ranks
from kdsr.losses.facd_loss import FACDLoss, patch_gate
from kdsr.losses.slkd_loss import edge_texture_distance, natural_scene_distance, spatial_kl
from kdsr.models.facd_model import FACDModel
from kdsr.models.slkd_model import SLKDModel
from small_runs import complete, run, seen

Options = dict[str, Any]
L1 = {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def facd_options(teacher_options: Options) -> Options:
    teacher_options["model_type"] = "FACDModel"
    teacher_options["train"].update(
        logits_opt=dict(L1),
        facd_opt={"type": "FACDLoss", "loss_weight": 0.5},
        taps=[{"student": "body.0", "teacher": "body.1"}, {"student": "conv_first", "teacher": "conv_first"}],
        gate="soft",
    )
    return teacher_options


@pytest.fixture
def slkd_options(run_options: Options) -> Options:
    """A small NAFNet of two levels; degraded and clean images are the same files."""
    network = {
        "type": "NAFNet",
        "width": 8,
        "enc_blk_nums": [1, 1],
        "middle_blk_num": 1,
        "dec_blk_nums": [1, 1],
    }
    wider = {**network, "width": 12}
    torch.manual_seed(7)
    for name in ("teacher", "teacher_b"):
        net = build_network(wider)
        for parameter in net.parameters():  # NAFNet's blocks begin as the identity
            torch.nn.init.normal_(parameter, std=0.1)
        torch.save({"params": net.state_dict()}, f"{name}.pth")
    for dataset in run_options["datasets"].values():
        dataset["dataroot_lq"] = dataset["dataroot_gt"]
    run_options.update(model_type="SLKDModel", scale=1, network_g=network, network_t=wider)
    run_options["path"]["pretrain_network_t"] = "teacher.pth"
    run_options["train"].update(
        logits_opt={**L1, "loss_weight": 0.5},
        kl_opt={"type": "SpatialKLLoss", "loss_weight": 0.5},
        nc_opt={"type": "NaturalSceneLoss", "loss_weight": 0.1},
        et_opt={"type": "EdgeTextureLoss", "loss_weight": 0.1},
        encoder_taps={"student": ["encoders.0", "encoders.1"], "teacher": ["encoders.0", "encoders.1"]},
        decoder_taps={"student": ["decoders.0", "decoders.1"], "teacher": ["decoders.0", "decoders.1"]},
    )
    return run_options


def assert_gradients_reach(
    model: Any, term: str, lq: torch.Tensor, gt: torch.Tensor, taps: list[str]
) -> None:
    """The term alone moves the student below its taps and its adapters, and no teacher."""
    model.feed_data({"lq": lq, "gt": gt})
    model.forward_step(1)[term].backward()
    reached = {name for name, parameter in model.bundle.named_parameters() if parameter.grad is not None}
    for tap in taps:
        assert f"student.{tap}" in reached
    assert any(name.startswith("adapters.") for name in reached)
    teachers = [teacher.net for teacher in model.teachers.values()]
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.parameters())


# ----------------------------------------------------------------------------------------------------------- FACD


def test_features_of_validated_images_are_not_held(facd_options: Options) -> None:
    del facd_options["train"]["ema_decay"]  # the student itself is validated then
    model = FACDModel(complete(facd_options))
    bundle = model.student_bundle
    for net in (model.net_g, model.net_t):
        with torch.no_grad():
            assert model.restore_with(net, torch.rand(1, 3, 24, 16)).shape == (1, 3, 96, 64)
    assert not any(
        taps._kept
        for taps in (*bundle.taps.values(), *(tap for tap, _ in model.teachers["t"]._taps.values()))
    )


def test_facd_is_the_contrast_of_adapted_features_times_the_gate(facd_options: Options) -> None:
    model = FACDModel(complete(facd_options))
    lq, gt = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 64, 64)
    model.feed_data({"lq": lq, "gt": gt})
    losses = model.forward_step(1)
    student, teacher, adapters = model.net_g, model.net_t, model.student_bundle.adapters["facd"]
    ours, theirs = seen(student, lq, "body.0", "conv_first"), seen(teacher, lq, "body.1", "conv_first")
    adapted, teacher_features = [adapters[0](ours[0]), adapters[1](ours[1])], theirs
    gate = patch_gate(student(lq), teacher(lq), gt, "soft")
    expected, bound = FACDLoss(0.5)(adapted, teacher_features, gate=gate)
    torch.testing.assert_close(losses["l_facd"], expected)
    assert set(losses) == {"l_pix", "l_ts", "l_facd"}
    torch.testing.assert_close(model.statistics()["mutual_information"], bound)
    torch.testing.assert_close(model.statistics()["gated"], gate.mean())
    assert 0 < float(gate.mean()) < 1


def test_facd_gradients(facd_options: Options) -> None:
    model = FACDModel(complete(facd_options))
    lq, gt = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 64, 64)
    assert_gradients_reach(model, "l_facd", lq, gt, ["conv_first.weight", "body.0.conv1.weight"])
    assert model.net_g.conv_last.weight.grad is None  # above the taps


def test_facd_trains_and_logs_its_bound(facd_options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    facd_options["logger"]["save_checkpoint_freq"] = 3
    assert run(facd_options) == 0
    message = capsys.readouterr().err
    assert all(f"{name}: " in message for name in ("l_facd", "mutual_information", "gated"))
    state = torch.load("experiments/run/training_states/3.state", weights_only=True)
    assert set(state["networks"]) == {"net_g", "net_g_ema", "adapters"}
    student = torch.load("experiments/run/models/net_g_3.pth", weights_only=True)["params"]
    assert student.keys() == state["networks"]["net_g"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": [{"student": "bdy.0", "teacher": "body.1"}]}, "has no module 'bdy.0'; did you mean body.0"),
        ({"taps": {"student": ["body.0"], "teacher": []}}, "1 modules of the student and 0 of the teacher"),
        ({"taps": None}, "train.taps: missing, train.facd_opt needs it; add"),
        ({"gate": "sotf"}, "train.gate: 'sotf' is neither hard nor soft nor off"),
        ({"gate_temperature": 0}, "train.gate_temperature: 0 is not above 0"),
    ],
)
def test_facd_options_that_cannot_be_run(
    facd_options: Options, change: Options, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    facd_options["train"].update(change)
    assert run(facd_options) == 2
    assert message in capsys.readouterr().err
    assert not Path("experiments").exists()


def test_facd_with_a_batch_of_one(facd_options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    facd_options["datasets"]["train"]["batch_size_per_gpu"] = 1
    assert run(facd_options) == 2
    assert (
        "set datasets.train.batch_size_per_gpu to 2 or more, or train on several GPUs"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_facd_takes_its_negatives_from_every_process(facd_options: Options, tmp_path: Path) -> None:
    """A batch of one has none of its own; two processes of one each have one, and train alike."""
    facd_options["datasets"]["train"].update(batch_size_per_gpu=1, dataset_enlarge_ratio=2)
    facd_options["logger"]["save_checkpoint_freq"] = 3
    facd_options["train"]["gate"] = "off"
    (tmp_path / "run.yml").write_text(yaml.safe_dump(facd_options), encoding="utf-8")
    assert ranks.run(tmp_path, ["-opt", "run.yml"]) == [0, 0]
    log = next(Path("experiments/run").glob("train_*.log")).read_text(encoding="utf-8")
    losses = [float(value) for value in re.findall(r"l_facd: (\S+)", log)]
    bounds = [float(value) for value in re.findall(r"mutual_information: (\S+)", log)]
    assert len(losses) == len(bounds) == 3
    for loss, bound in zip(losses, bounds, strict=True):  # K = 2: the bound is log 2 - L, the weight is 0.5
        assert bound == pytest.approx(math.log(2) - loss / 0.5, abs=1e-3)
    assert bounds[0] != 0


# ----------------------------------------------------------------------------------------------------------- SLKD


@pytest.mark.parametrize("own_teacher_b", [False, True])
def test_slkd_terms_are_those_of_the_parts(slkd_options: Options, own_teacher_b: bool) -> None:
    if own_teacher_b:
        slkd_options["network_tb"] = dict(slkd_options["network_t"])
        slkd_options["path"]["pretrain_network_tb"] = "teacher_b.pth"
    model = SLKDModel(complete(slkd_options))
    assert ("tb" in model.teachers) is own_teacher_b
    teacher_b = model.teachers["tb" if own_teacher_b else "t"].net
    lq, gt = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    model.feed_data({"lq": lq, "gt": gt})
    losses = model.forward_step(1)

    encoder_taps, decoder_taps = ("encoders.0", "encoders.1"), ("decoders.0", "decoders.1")
    ours, ours_late = seen(model.net_g, lq, *encoder_taps), seen(model.net_g, lq, *decoder_taps)
    degraded, clean = seen(model.net_t, lq, *encoder_taps), seen(teacher_b, gt, *decoder_taps)
    adapters = model.student_bundle.adapters
    encoder = [adapter(feature) for adapter, feature in zip(adapters["nc_opt"], ours, strict=True)]
    decoder = [adapter(feature) for adapter, feature in zip(adapters["et_opt"], ours_late, strict=True)]
    expected = {
        "l_nc": 0.1 * natural_scene_distance(encoder, degraded),
        "l_et": 0.1 * edge_texture_distance(decoder, clean, [2, 1]),
        "l_kl": 0.5 * spatial_kl(model.net_g(lq), model.net_t(lq)),
        "l_ts": 0.5 * (model.net_g(lq) - model.net_t(lq)).abs().mean(),
        "l_pix": (model.net_g(lq) - gt).abs().mean(),
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)
        assert float(value) > 0


@pytest.mark.parametrize(
    ("term", "taps"),
    [("l_nc", ["intro.weight", "encoders.0.0.beta"]), ("l_et", ["intro.weight", "decoders.1.0.beta"])],
)
def test_slkd_gradients(slkd_options: Options, term: str, taps: list[str]) -> None:
    model = SLKDModel(complete(slkd_options))
    lq, gt = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert_gradients_reach(model, term, lq, gt, taps)
    assert model.net_g.ending.weight.grad is None


def test_slkd_trains_and_resumes(slkd_options: Options) -> None:
    slkd_options["logger"]["save_checkpoint_freq"] = 2
    assert run(slkd_options) == 0
    slkd_options["train"]["total_iter"] = 4
    assert run(slkd_options, "--auto_resume") == 0
    resumed = torch.load("experiments/run/training_states/4.state", weights_only=True)["networks"]
    assert run(slkd_options) == 0
    whole = torch.load("experiments/run/training_states/4.state", weights_only=True)["networks"]
    for network, weights in whole.items():
        assert all(torch.equal(value, resumed[network][name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"encoder_taps": None}}, "train.encoder_taps: missing, train.nc_opt needs it"),
        (
            {"train": {"decoder_taps": {"student": ["up.0"], "teacher": ["decodes.0"]}}},
            "no module 'up.0'; did you mean ups.0?",
        ),
        ({"network_tb": {"type": "NAFNet", "width": 12}}, "path.pretrain_network_tb: missing"),
        ({"network_t": None}, "train.nc_opt: needs a teacher; give network_t"),
    ],
)
def test_slkd_options_that_cannot_be_run(
    slkd_options: Options, change: Options, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in change.items():
        if key == "train":
            slkd_options["train"].update(value)
        else:
            slkd_options[key] = value
    assert run(slkd_options) == 2
    assert message in capsys.readouterr().err


def test_slkd_for_super_resolution_is_refused(
    slkd_options: Options, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dataset in slkd_options["datasets"].values():
        dataset["dataroot_lq"] = str(photos / "LR_x4")
    slkd_options["scale"] = 4
    assert run(slkd_options) == 2
    assert "scale: train.et_opt gives Teacher B the clean image" in capsys.readouterr().err


def test_a_teacher_b_of_another_shape(slkd_options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    slkd_options["network_tb"] = {**slkd_options["network_t"], "width": 16}
    slkd_options["path"]["pretrain_network_tb"] = "teacher_b.pth"
    assert run(slkd_options) == 2
    message = capsys.readouterr().err
    assert "path.pretrain_network_tb" in message and "does not fit NAFNet" in message
