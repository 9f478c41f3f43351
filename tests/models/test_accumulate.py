"""``train.accumulate``: one update from several batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import ranks
from kdsr.models.kd_model import KDModel
from kdsr.options.check import check
from small_runs import after_steps, complete, problems_after, run

Options = dict[str, Any]


def images(count: int, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"{number}.png" for number in range(count)]
    lq = torch.rand(count, 3, 8, 8, generator=generator)
    return {"lq": lq, "gt": torch.rand(count, 3, 32, 32, generator=generator), "lq_path": names}


def make(options: Options, batches: int, **train: Any) -> KDModel:
    options = complete(options)
    options["train"].update(accumulate=batches, **train)
    torch.manual_seed(0)
    return KDModel(options)


def trained(model: KDModel, data: dict[str, Any], steps: int = 3) -> list[Tensor]:
    for iteration in range(1, steps + 1):
        model.feed_data(data)
        model.optimize_parameters(iteration)
    return [value for net in (model.net_g, model.net_g_ema) for value in net.state_dict().values()]


@pytest.mark.parametrize("batches", [2, 3, 4])  # 3 + 2 images, 2 + 2 + 1, 2 + 2 + 1
def test_it_is_the_update_of_the_large_batch(teacher_options: Options, batches: int) -> None:
    teacher_options["train"].update(logits_opt={"type": "L1Loss"}, optim_g={"type": "SGD", "lr": 0.1})
    whole, parts = (make(teacher_options, number, clip_grad_norm=0.5) for number in (1, batches))
    for ours, theirs in zip(trained(parts, images(5)), trained(whole, images(5)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert parts.get_current_log() == pytest.approx(whole.get_current_log(), rel=1e-5)


def test_networks_get_the_batches_one_by_one(dckd_options: Options) -> None:
    dckd_options["train"].update(lcr_opt=None)
    model = make(dckd_options, 2)
    seen: dict[str, list[int]] = {"net_g": [], "net_t": [], "net_vqgan": [], "net_his": []}
    for name, sizes in seen.items():
        model.networks()[name].register_forward_hook(
            lambda _, given, __, sizes=sizes: sizes.append(len(given[0]))
        )
    model.feed_data(images(4))
    model.optimize_parameters(1)
    assert {name: sorted(sizes) for name, sizes in seen.items()} == {
        "net_g": [2, 2], "net_t": [2, 2], "net_vqgan": [2, 2, 8, 8], "net_his": [6, 6],
    }  # fmt: skip
    assert not model.step.teacher_views  # memory of the step is free


@pytest.mark.parametrize("fused", [False, True])
def test_one_bad_batch_skips_the_whole_update(run_options: Options, fused: bool) -> None:
    run_options["train"]["optim_g"]["fused"] = fused
    for bad in (0, 3):  # in the first batch, in the last one
        model = make(run_options, 2)
        before = [value.clone() for value in model.net_g.state_dict().values()]
        data = images(4)
        data["lq"][bad, 0, 0, 0] = math.nan
        trained(model, data, steps=1)
        assert all(map(torch.equal, before, model.net_g.state_dict().values()))
        assert model.guard.skipped.item() == 1


def test_the_scale_of_fp16_is_divided_out_once(run_options: Options) -> None:
    run_options["train"]["optim_g"] = {"type": "SGD", "lr": 0.1}
    plain = make(run_options, 1)
    run_options["precision"] = {"amp": "fp16"}
    scaled = make(run_options, 2)
    for ours, theirs in zip(trained(scaled, images(4), 1), trained(plain, images(4), 1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    assert scaled.guard.made


def test_what_is_drawn_is_the_same_each_time(dckd_options: Options) -> None:
    first, second = (trained(make(dckd_options, 2), images(4)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_statistics_are_means(teacher_options: Options) -> None:
    teacher_options["train"].update(
        facd_opt={"type": "FACDLoss"}, taps=[{"student": "body.0", "teacher": "body.1"}], gate="soft"
    )
    model = make(teacher_options, 2)
    data = images(4)
    model.feed_data(data)
    model.compute_gradients(1)
    gated = model.statistics()["gated"].item()
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        model.forward_step(1, (data["lq"][rows], data["gt"][rows], None))
        halves.append(model.statistics()["gated"].item())
    assert halves[0] != halves[1] and gated == pytest.approx(sum(halves) / 2)


def test_wrong_values(run_options: Options) -> None:
    assert problems_after(run_options, {"train.accumulate": 0}) == ["train.accumulate: 0 is below 1"]
    assert problems_after(run_options, {"train.accumulate": "all"}) == [
        "train.accumulate: expected a whole number, got the text 'all'"
    ]


def test_models_without_it_refuse_it(vqgan_options: Options) -> None:
    vqgan_options["train"]["accumulate"] = 2
    assert any(
        problem.startswith("train.accumulate: VQGANModel does not read it")
        for problem in check(vqgan_options, True)
    )


def test_an_epoch_shorter_than_the_batches_of_an_iteration(
    run_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_options["train"]["accumulate"] = 3
    assert run(run_options) == 2
    assert "fewer than one batch of 6; raise dataset_enlarge_ratio or lower" in capsys.readouterr().err


def _note_the_weights(rank: int) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    calls: list[int] = []
    init = KDModel.init_training_settings

    def init_training_settings(self: KDModel) -> None:
        init(self)
        self.bundle.register_comm_hook(
            None, lambda state, bucket: calls.append(1) or allreduce_hook(state, bucket)
        )

    KDModel.init_training_settings = init_training_settings  # type: ignore[method-assign]

    def save(model: KDModel, iteration: int) -> None:
        torch.save({"weights": model.net_g.state_dict(), "reductions": len(calls)}, f"{rank}_{iteration}.pt")

    after_steps(save)


@pytest.mark.slow
def test_two_ranks_reduce_once_per_iteration(run_options: Options, tmp_path: Path) -> None:
    """Two ranks of two batches each train like one process with all of their images."""
    run_options["train"].update(accumulate=2, optim_g={"type": "SGD", "lr": 0.1})
    run_options["datasets"]["train"].update(batch_size_per_gpu=1, use_hflip=False, use_rot=False)
    run_options["val"] = None
    del run_options["datasets"]["val"]
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    assert ranks.run(tmp_path, ["-opt", "run.yml"], prepare=_note_the_weights) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}_3.pt") for rank in range(2))
    assert all(map(torch.equal, first["weights"].values(), second["weights"].values()))
    assert first["reductions"] == 3 * 1 + 1  # the iterations and the rehearsal, one bucket each


def test_stored_outputs_of_the_teacher_are_split_too(teacher_options: Options) -> None:
    teacher_options["train"].update(logits_opt={"type": "L1Loss"}, pixel_opt=None)
    found = []
    for batches in (1, 2):
        model = make(teacher_options, batches)
        model.feed_data(images(4))
        model.teacher_output = images(4, seed=2)["gt"]
        found.append(model.compute_gradients(1)["l_ts"].item())
    assert found[0] == pytest.approx(found[1])
