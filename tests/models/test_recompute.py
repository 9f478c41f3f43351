"""``train.checkpoint_student``: the student's blocks are computed again in the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from torch import nn

from kdsr.models.kd_model import KDModel
from kdsr.models.recompute import blocks_of, recompute_blocks
from kdsr.runtime.errors import OptionError
from small_networks import SMALL
from small_runs import complete, problems_after, run

Options = dict[str, Any]
NETWORKS: dict[str, Options] = {
    "SwinIR": {**SMALL["SwinIR"], "depths": [2, 2], "num_heads": [2, 2], "upscale": 4, "img_size": 16, "window_size": 8,
               "upsampler": "pixelshuffledirect", "drop_path_rate": 0.5},
    "EDSR": {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 3, "upscale": 4},
    "RCAN": {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 16, "num_group": 2, "num_block": 2, "upscale": 4},
    "NAFNet": SMALL["NAFNet"],
}  # fmt: skip
BLOCKS = {
    "SwinIR": ["layers.0", "layers.1"],
    "EDSR": ["body.0", "body.1", "body.2"],
    "RCAN": ["body.0", "body.1"],
}


def make(options: Options, **train: Any) -> KDModel:
    options = complete(options)
    options["train"].update(train)
    torch.manual_seed(0)
    return KDModel(options)


def stepped(model: KDModel, side: int = 16) -> tuple[dict[str, float], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    gt = torch.rand(2, 3, side * model.opt["scale"], side * model.opt["scale"], generator=generator)
    torch.manual_seed(2)
    for iteration in (1, 2):
        model.feed_data({"lq": torch.rand(2, 3, side, side, generator=generator), "gt": gt})
        model.optimize_parameters(iteration)
    gradients = [parameter.grad for parameter in model.bundle.parameters()]
    return model.get_current_log(), [*model.net_g.state_dict().values(), *gradients, torch.rand(1)]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("amp", [None, "bf16"])
def test_losses_gradients_and_draws_are_the_same_to_the_bit(
    run_options: Options, kind: str, amp: str | None
) -> None:
    run_options.update(network_g={"type": kind, **NETWORKS[kind]}, precision={"amp": amp})
    run_options["scale"] = 1 if kind == "NAFNet" else 4
    log, tensors = stepped(make(run_options))
    model = make(run_options, checkpoint_student=True)
    calls: list[int] = []
    inner = next(
        module
        for _, block in blocks_of(model.net_g)
        for module in block.modules()
        if not [*module.children()]
    )
    inner.register_forward_hook(lambda *_: calls.append(1))
    recomputed, others = stepped(model)
    assert recomputed == log and all(map(torch.equal, tensors, others))
    assert len(calls) == 4  # twice in each of two steps


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_blocks(kind: str) -> None:
    net = build_network({"type": kind, **copy.deepcopy(NETWORKS[kind])})
    assert [name for name, _ in blocks_of(net)] == BLOCKS[kind]


def test_features_inside_and_at_the_end_of_a_block(teacher_options: Options) -> None:
    teacher_options["train"].update(
        fitnet_opt={"type": "FitNetLoss"},
        taps=[{"student": "body.0", "teacher": "body.1"}, {"student": "body.0.conv1", "teacher": "body.0"}],
    )
    log, tensors = stepped(make(teacher_options))
    model = make(teacher_options, checkpoint_student=True)
    recomputed, others = stepped(model)
    assert recomputed == log and all(map(torch.equal, tensors, others))
    assert not any(taps._kept for taps in model.student_bundle.taps.values())


def test_less_is_kept_for_the_backward_pass(run_options: Options) -> None:
    run_options["network_g"] = {"type": "EDSR", **NETWORKS["EDSR"], "num_block": 8}
    kept = []
    for again in (False, True):
        model = make(run_options, checkpoint_student=again)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
        ):
            model.net_g(torch.rand(1, 3, 16, 16))
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.PReLU(), nn.Conv2d(3, 3, 1))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return self.other(self.conv(x))


def test_networks_that_it_does_not_suit() -> None:
    with pytest.raises(
        OptionError, match="train.checkpoint_student: Flat has no list of blocks to recompute"
    ):
        recompute_blocks(Flat())
    net = nn.ModuleDict({"body": nn.Sequential(InPlace())})
    recompute_blocks(net)
    with pytest.raises(
        OptionError, match="ModuleDict cannot be recomputed, body.0 changes its input in place"
    ):
        net["body"](torch.rand(1, 3, 4, 4))


def test_a_run_refuses_it_before_anything_is_written(
    run_options: Options, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_options["network_g"] = {"type": "SRVGGNetCompact", "num_feat": 8, "num_conv": 1, "upscale": 4}
    run_options["train"]["checkpoint_student"] = True
    assert run(run_options) == 2
    assert "train.checkpoint_student: SRVGGNetCompact has no list of blocks" in capsys.readouterr().err
    assert not (tmp_path / "experiments").exists()


def test_with_blocks_that_are_replaced(teacher_options: Options) -> None:
    changes = {
        "train.bm_opt": {"type": "L1Loss"},
        "train.blocks": [{"student": "body.0", "teacher": "body.0"}],
        "train.checkpoint_student": True,
    }
    assert problems_after(teacher_options, changes) == [
        "train.checkpoint_student: train.bm_opt replaces blocks of the student; set it to false"
    ]
