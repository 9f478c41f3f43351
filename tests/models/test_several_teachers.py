"""``network_t`` as a list: the teacher is the weighted mean of its networks."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network

from kdsr.models.kd_model import KDModel
from kdsr.options.check import check
from kdsr.pipeline.resume import changes, run_record
from kdsr.runtime.errors import OptionError
from small_runs import complete, problems_after, run

Options = dict[str, Any]


@pytest.fixture
def several(teacher_options: Options) -> Options:
    """Teachers of two types, one of which takes multiples of 8 only."""
    first = teacher_options["network_t"]
    second = {"type": "SwinIR", "upscale": 4, "window_size": 8, "depths": [2], "num_heads": [2], "embed_dim": 8,
              "img_size": 16, "mlp_ratio": 2, "upsampler": "pixelshuffledirect"}  # fmt: skip
    torch.save({"params_ema": build_network(copy.deepcopy(second)).state_dict()}, "second.pth")
    teacher_options["network_t"] = [first, second]
    teacher_options["path"] = {
        "pretrain_network_t": ["teacher.pth", "second.pth"],
        "strict_load_t": True,
        "param_key_t": ["params", "auto"],
    }
    l1 = {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
    teacher_options["train"].update(logits_opt=l1, lcr_opt=dict(l1), wavelet_opt={"type": "WaveletLoss"})
    return teacher_options


def built(options: Options) -> KDModel:
    return KDModel(complete(options))


@pytest.mark.parametrize("weights", [None, [3, 1]])
def test_the_teacher_is_the_mean(several: Options, weights: list[float] | None) -> None:
    several["train"]["teacher_weights"] = weights
    assert check(several, True) == []
    model = built(several)
    lq = torch.rand(2, 3, 16, 16)
    first, second = (net(lq) for net in model.net_t)
    one, two = (0.5, 0.5) if weights is None else (0.75, 0.25)
    torch.testing.assert_close(model.net_t(lq), one * first + two * second)
    model.feed_data({"lq": lq, "gt": torch.rand(2, 3, 64, 64)})
    model.optimize_parameters(1)
    torch.testing.assert_close(model.step.teacher_output, one * first + two * second)
    assert {"l_pix", "l_ts", "l_lcr", "l_wavelet"} <= set(model.get_current_log())
    assert set(model.state_networks()) == {"net_g", "net_g_ema"}
    restored = model.restore_with(
        model.net_t, torch.rand(1, 3, 13, 19)
    )  # padded to the windows of the second
    assert restored.shape == (1, 3, 52, 76)


def test_features_are_those_of_the_named_teacher(several: Options) -> None:
    several["train"].update(
        fakd_opt={"type": "AffinityLoss"}, taps=[{"student": "body.0", "teacher": "0.body.1/2"}]
    )
    assert check(several, True) == []
    model = built(several)
    model.feed_data({"lq": torch.rand(2, 3, 16, 16), "gt": torch.rand(2, 3, 64, 64)})
    model.compute_gradients(1)
    kept: list[torch.Tensor] = []
    model.net_t[0].body[0].register_forward_hook(lambda module, x, output: kept.append(output))
    model.net_t[0](model.lq)
    (features,) = model.step.teacher_features.values()
    torch.testing.assert_close(features[0], kept[0])


def test_features_without_the_number_of_a_teacher(several: Options) -> None:
    several["train"].update(
        fakd_opt={"type": "AffinityLoss"}, taps=[{"student": "body.0", "teacher": "body.1"}]
    )
    with pytest.raises(OptionError, match="train.taps.teacher: .*body.1.*; did you mean 0.body.1"):
        built(several)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_t": []}, "network_t: [] has fewer than 1 items"),
        ({"network_t.1.num_heds": [2]}, "network_t.1.num_heds: SwinIR has no such parameter; did you mean num_heads?"),
        ({"network_t.1.upscale": 2}, "network_t.1.upscale: is 2, but scale is 4"),
        ({"network_t.1": "SwinIR"}, "network_t.1: expected a section, got the text 'SwinIR'"),
        (
            {"datasets.train.gt_size": 80},
            "datasets.train.gt_size: 80 gives LQ patches of 20, but network_t.1 takes multiples of its window_size 8",
        ),
        (
            {"path.pretrain_network_t.1": "no.pth"},
            "path.pretrain_network_t.1: there is no file no.pth (relative to the working directory)",
        ),
        (
            {"path.pretrain_network_t": ["teacher.pth"]},
            "path.pretrain_network_t: is a list of 1, and network_t is a list of 2 networks",
        ),
        (
            {"path.pretrain_network_t": "teacher.pth"},
            "path.pretrain_network_t: network_t is a list of 2 networks; give a list with a file for each",
        ),
        (
            {"path.pretrain_network_t.1": None},
            "path.pretrain_network_t.1: missing; a teacher with random weights is of no use",
        ),
        ({"path.init_from": "teacher"}, "path.init_from: teacher: network_t is a list; give a checkpoint"),
        (
            {"train.teacher_weights": [1]},
            "train.teacher_weights: [1]: network_t is a list of 2 networks; give a weight for each of its networks, "
            "at least one above 0",
        ),
        ({"train.teacher_weights": [1, -1]}, "train.teacher_weights.1: -1 is below 0"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(several: Options, change: Options, message: str) -> None:
    assert message in problems_after(several, change)


def test_weights_and_lists_of_one_teacher(teacher_options: Options) -> None:
    changed = {"train.teacher_weights": [1.0], "path.pretrain_network_t": ["teacher.pth"]}
    found = problems_after(teacher_options, changed)
    assert "path.pretrain_network_t: is a list of 1, and network_t is one network" in found
    assert any(problem.startswith("train.teacher_weights: [1.0]: network_t is no list;") for problem in found)
    assert problems_after(teacher_options, {"network_g": [teacher_options["network_g"]]})


def test_a_file_that_does_not_fit_is_named(several: Options, capsys: pytest.CaptureFixture[str]) -> None:
    several["path"]["pretrain_network_t"] = ["teacher.pth", "teacher.pth"]
    assert run(several) == 2
    assert "path.pretrain_network_t.1: teacher.pth" in capsys.readouterr().err


def test_a_teacher_of_another_scale_is_named(several: Options, capsys: pytest.CaptureFixture[str]) -> None:
    several["network_t"][1]["upsampler"] = None  # keeps the size, whatever its upscale says
    torch.save({"params": build_network(copy.deepcopy(several["network_t"][1])).state_dict()}, "second.pth")
    assert run(several) == 2
    assert "network_t.1: gives images of 3×16×16, network_t.0 of 3×64×64" in capsys.readouterr().err


def test_each_teacher_is_measured_and_the_mean(several: Options) -> None:
    several["train"]["total_iter"] = 1
    several["val"]["teacher"] = True
    assert run(several) == 0
    with Path("experiments/run/metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["network"].startswith("teacher")]
    assert [*dict.fromkeys(row["network"] for row in rows)] == ["teacher.0", "teacher.1", "teacher"]
    (log,) = Path("experiments/run").glob("train_*.log")
    text = log.read_text("utf-8")
    for message in ("Validation of the teacher network_t.1, held_out", "Validation of the teacher, held_out"):
        assert message in text
    for which in (" (", ", network_t.0, (", ", network_t.1, ("):  # each has random weights
        assert f"THE TEACHER IS WORSE THAN BICUBIC INTERPOLATION on held_out{which}" in text


def test_other_teachers_are_another_run(several: Options, photos: Path) -> None:
    class Images:
        opt = several["datasets"]["train"]
        paths: tuple[str, ...] = ()

        def __len__(self) -> int:
            return 1

    record = run_record(copy.deepcopy(several), Images())
    assert set(record["fingerprints"]["networks"]) == {"t.0", "t.1"}
    state = {**record, "networks": {"net_g": {}}}
    assert changes(state, record, "state") == []
    other = copy.deepcopy(several)
    torch.save(
        {"params": build_network({**several["network_g"], "num_feat": 12, "num_block": 2}).state_dict()},
        "teacher.pth",
    )
    with pytest.raises(Exception, match="path.pretrain_network_t.0: the weights have changed"):
        changes(state, run_record(other, Images()), "state")
    other["network_t"][1]["embed_dim"] = 12
    with pytest.raises(
        Exception, match="network_t.1.embed_dim: 8 -> 12; the run was trained with another network"
    ):
        changes(state, run_record(other, Images()), "state")
