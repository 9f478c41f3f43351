"""MiPKDModel: its terms from the parts, what the gradient reaches, two processes, and what is refused at the start."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ranks
from kdsr.distill.step import Step
from kdsr.models.mipkd_model import MiPKDModel
from small_runs import after_steps, complete, run, seen

Options = dict[str, Any]
L1 = {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
TAPS = [{"student": "body.0", "teacher": "body.1"}, {"student": "conv_first", "teacher": "conv_first"}]


@pytest.fixture
def options(teacher_options: Options) -> Options:
    teacher_options.update(model_type="MiPKDModel")
    teacher_options["train"].update(
        logits_opt=dict(L1),
        fm_opt={"type": "FitNetLoss", "loss_weight": 1.0},
        fm_aux_opt={"type": "FitNetLoss", "loss_weight": 0.5},
        bm_opt={**L1, "loss_weight": 0.1},
        taps=copy.deepcopy(TAPS),
        blocks=[{"student": "body.0", "teacher": "body.1"}],
    )
    return teacher_options


def fed(model: MiPKDModel) -> MiPKDModel:
    torch.manual_seed(2)
    model.feed_data({"lq": torch.rand(3, 3, 16, 16), "gt": torch.rand(3, 3, 64, 64)})
    return model


@pytest.mark.parametrize("taken", [False, True])
def test_the_terms_are_those_of_the_parts(options: Options, taken: bool) -> None:
    options["train"]["block_ratio"] = float(taken)
    model = fed(MiPKDModel(complete(options)))
    losses = model.compute_gradients(1)
    masks = model.step.student_inputs["feature_mixing"][1]
    student, teacher, passes = model.net_g, model.net_t, model.student_bundle.passes
    ours, theirs = (
        seen(student, model.lq, "body.0", "conv_first"),
        seen(teacher, model.lq, "body.1", "conv_first"),
    )
    mixtures, own = [], []
    for mixer, feature, teacher_feature, mask in zip(
        passes["feature_mixing"].mixers, ours, theirs, masks, strict=True
    ):
        latent = mixer.teacher(teacher_feature)
        mixtures.append(
            (mixer.decoder(mask * latent + ~mask * mixer.student(feature)) - teacher_feature).abs().mean()
        )
        own.append((mixer.decoder(latent) - teacher_feature).abs().mean())
        assert 0.4 < float(mask.float().mean()) < 0.6
    out_mixed = passes["block_mixing"](student, model.lq, [taken])
    expected = {
        "l_pix": (student(model.lq) - model.gt).abs().mean(),
        "l_ts": (student(model.lq) - teacher(model.lq)).abs().mean(),
        "l_fm": torch.stack(mixtures).mean(),
        "l_fm_aux": 0.5 * torch.stack(own).mean(),
        "l_bm": 0.1 * (out_mixed - teacher(model.lq)).abs().mean(),
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)
        assert value > 0


@pytest.mark.parametrize("ratios", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_every_step_gives_every_trained_parameter_a_gradient(
    options: Options, ratios: tuple[float, float]
) -> None:
    """Which is what DDP counts on without find_unused_parameters."""
    options["train"].update(mix_ratio=ratios[0], block_ratio=ratios[1])
    model = fed(MiPKDModel(complete(options)))
    model.compute_gradients(1)
    missing = [name for name, parameter in model.bundle.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(parameter.grad is None for parameter in model.net_t.parameters())


@pytest.mark.parametrize("term", ["l_fm", "l_bm"])
def test_each_term_reaches_the_student(options: Options, term: str) -> None:
    options["train"]["block_ratio"] = 1.0
    model = fed(MiPKDModel(complete(options)))
    model.forward_step(1)[term].backward()
    assert model.net_g.conv_first.weight.grad.abs().sum() > 0
    assert (model.net_g.conv_last.weight.grad is not None) == (term == "l_bm")
    assert (model.net_g.body[0].conv1.weight.grad is not None) == (term == "l_fm")  # replaced in l_bm


def test_draws_change_from_step_to_step_and_come_from_the_models_generator(options: Options) -> None:
    model = fed(MiPKDModel(complete(options)))
    start = model.generator.get_state()

    def inputs() -> dict[str, Any]:
        step = model.begin_step(1)
        with torch.no_grad():
            model.run_frozen(step)
        return step.student_inputs

    first, second = inputs(), inputs()
    model.generator.set_state(start)
    again = inputs()

    def masks(views: dict[str, Any]) -> torch.Tensor:
        return torch.cat([mask.flatten() for mask in views["feature_mixing"][1]])

    assert torch.equal(masks(first), masks(again))
    assert first["block_mixing"][1] == again["block_mixing"][1]
    assert not torch.equal(masks(first), masks(second))
    drawn = {inputs()["block_mixing"][1][0] for _ in range(20)}
    assert drawn == {True, False}


def test_other_terms_compare_the_teachers_own_features(options: Options) -> None:
    """A block of the teacher that runs again in the mixed pass is tapped by FitNet too."""
    options["train"].update(fitnet_opt={"type": "FitNetLoss"}, block_ratio=1.0)
    model = fed(MiPKDModel(complete(options)))
    losses = model.compute_gradients(1)
    ours, theirs = (
        seen(model.net_g, model.lq, "body.0", "conv_first"),
        seen(model.net_t, model.lq, "body.1", "conv_first"),
    )
    adapted = [
        adapter(feature)
        for adapter, feature in zip(model.student_bundle.adapters["fitnet"], ours, strict=True)
    ]
    expected = torch.stack([(s - t).abs().mean() for s, t in zip(adapted, theirs, strict=True)]).mean()
    torch.testing.assert_close(losses["l_fitnet"], expected)


@pytest.mark.parametrize(
    ("off", "names"),
    [
        (("bm_opt", "blocks"), {"l_pix", "l_ts", "l_fm", "l_fm_aux"}),
        (("fm_opt", "fm_aux_opt", "taps"), {"l_pix", "l_ts", "l_bm"}),
        (("fm_aux_opt", "logits_opt", "pixel_opt"), {"l_fm", "l_bm"}),
    ],
)
def test_each_part_can_be_off(options: Options, off: tuple[str, ...], names: set[str]) -> None:
    for key in off:
        del options["train"][key]
    losses = fed(MiPKDModel(complete(options))).compute_gradients(1)
    assert set(losses) == names


def test_it_composes_with_views_and_label_consistency(options: Options) -> None:
    options["train"].update(lcr_opt=dict(L1), zoom_in_opt=dict(L1), zoom_out_opt=dict(L1))
    losses = fed(MiPKDModel(complete(options))).compute_gradients(1)
    assert {"l_lcr", "l_zoom_in", "l_zoom_out", "l_fm", "l_bm"} <= set(losses)
    assert all(value.isfinite() for value in losses.values())


def test_mixers_are_in_the_state_and_not_in_the_students_file(options: Options) -> None:
    options["logger"]["save_checkpoint_freq"] = 3
    assert run(options) == 0
    state = torch.load("experiments/run/training_states/3.state", weights_only=True)["networks"]
    assert set(state) == {"net_g", "net_g_ema", "passes"}
    parts = {name.split(".")[0] for name in state["passes"]}
    assert parts == {"feature_mixing", "block_mixing"}
    teacher = torch.load("teacher.pth", weights_only=True)["params"]
    shapes = {tuple(value.shape) for value in state["passes"].values()}
    assert tuple(teacher["conv_last.weight"].shape) not in shapes
    student = torch.load("experiments/run/models/net_g_3.pth", weights_only=True)["params"]
    assert student.keys() == state["net_g"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks": [{"student": "bdy.0", "teacher": "body.1"}]},
            "has no module 'bdy.0'; did you mean body.0",
        ),
        (
            {"blocks": [{"student": "body.0", "teacher": "upsample"}]},
            "except for the channels these must be equal",
        ),
        ({"blocks": ["body.0"]}, "train.blocks.0: 'body.0' is not a list of blocks; give pairs"),
        ({"blocks": None}, "train.blocks: missing, train.bm_opt needs it"),
        ({"taps": None}, "train.taps: missing, train.fm_opt needs it"),
        (
            {"taps": [{"student": "bdy.0", "teacher": "body.1"}]},
            "train.taps.student: EDSR has no module 'bdy.0'",
        ),
        (
            {"fm_opt": None, "fm_aux_opt": None, "bm_opt": None},
            "train.fm_opt or train.bm_opt: missing, required by MiPKDModel",
        ),
        (
            {"fm_opt": {"type": "FACDLoss"}},
            "train.fm_opt.type: FACDLoss is not a loss of this term; use FitNetLoss",
        ),
        ({"mix_ratio": 1.5}, "train.mix_ratio: 1.5 is above 1"),
        ({"block_ratio": -1}, "train.block_ratio: -1 is below 0"),
    ],
)
def test_options_that_cannot_be_run(
    options: Options, change: Options, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options["train"].update(change)
    assert run(options) == 2
    assert message in capsys.readouterr().err
    assert not Path("experiments").exists()


def test_without_a_teacher(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    del options["network_t"], options["path"]["pretrain_network_t"]
    assert run(options) == 2
    assert "train.fm_opt: needs a teacher; give network_t" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_alike(options: Options, tmp_path: Path) -> None:
    """Their draws differ, the parameters that they use do not: no find_unused_parameters, and the same weights."""
    options["datasets"]["train"].update(batch_size_per_gpu=1, dataset_enlarge_ratio=4)
    options["logger"]["save_checkpoint_freq"] = 6
    options["train"]["total_iter"] = 6
    (tmp_path / "run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert ranks.run(tmp_path, ["-opt", "run.yml"], prepare=_note_the_weights) == [0, 0]
    first, second = (torch.load(f"rank_{rank}.pth", weights_only=True) for rank in (0, 1))
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["taken"] != second["taken"]


def _note_the_weights(rank: int) -> None:
    """Writes what a rank drew and where its trained parameters ended."""
    run_student = MiPKDModel.run_student
    taken: list[bool] = []

    def note_what_is_drawn(self: MiPKDModel, step: Step) -> None:
        taken.extend(step.student_inputs["block_mixing"][1])
        run_student(self, step)

    def save_weights(model: Any, current_iter: int) -> None:
        weights = {name: value.clone() for name, value in model.student_bundle.state_dict().items()}
        torch.save({"weights": weights, "taken": taken}, f"rank_{rank}.pth")

    MiPKDModel.run_student = note_what_is_drawn  # type: ignore[method-assign]
    after_steps(save_weights)
