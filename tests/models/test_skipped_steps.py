"""A training step that is not finite: its effects, the log messages, when a run stops, what a state keeps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kdsr.models.dckd_model import DCKDModel
from kdsr.models.kd_model import KDModel
from kdsr.runtime.declarations import check_section
from kdsr.runtime.errors import TrainingError
from small_runs import run

PATHS = ("fused", "read on the host")


def make(options: dict[str, Any], kind: type[KDModel] = KDModel, **derived: Any) -> Any:
    options = copy.deepcopy(options) | {"num_gpu": 0, "dist": False, "rank": 0, "world_size": 1}
    torch.manual_seed(0)
    return kind(options | {"is_train": True} | derived)


def batch(number: int, bad: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    lq = torch.rand(2, 3, 16, 16, generator=generator)
    gt = torch.rand(2, 3, 64, 64, generator=generator)
    if bad:
        lq[1, 0, 3, 3] = math.nan
    return {"lq": lq, "gt": gt, "lq_path": [f"{number}a.png", f"{number}b.png"], "gt_path": ["?", "?"]}


def step(model: Any, iteration: int, bad: bool = False) -> None:
    model.feed_data(batch(iteration, bad))
    model.optimize_parameters(iteration)


def weights(*nets: torch.nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for net in nets for tensor in net.state_dict().values()]


def equal(ours: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, others, strict=True))


# -------------------------------------------------------------------------------------------- one step, skipped


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [{1}, {3, 4}])
def test_the_run_is_that_of_a_plain_loop_without_the_step(
    run_options: dict[str, Any], path: str, bad: set[int]
) -> None:
    run_options["train"]["optim_g"]["fused"] = path == "fused"
    model = make(run_options)
    plain, ema = copy.deepcopy(model.net_g), copy.deepcopy(model.net_g_ema)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=path == "fused")
    for iteration in range(1, 7):
        step(model, iteration, iteration in bad)
        if iteration not in bad:
            data = batch(iteration)
            optimizer.zero_grad()
            (plain(data["lq"]) - data["gt"]).abs().mean().backward()
            optimizer.step()
            for average, weight in zip(ema.parameters(), plain.parameters(), strict=True):
                average.mul_(0.9).add_(weight.detach(), alpha=1 - 0.9)
    assert model.net_g.training and equal(weights(model.net_g), weights(plain))
    if path == "fused":  # the EMA's two factors are tensors then, and the last bit may differ
        for ours, expected in zip(weights(model.net_g_ema), weights(ema), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    else:
        assert equal(weights(model.net_g_ema), weights(ema))
    steps = {entry["step"].item() for entry in model.optimizer_g.state.values()}
    assert steps == {6 - len(bad)}
    assert model.guard.skipped.item() == len(bad)


@pytest.mark.parametrize("path", PATHS)
def test_a_skipped_step_of_dckd_is_one_without_its_update(dckd_options: dict[str, Any], path: str) -> None:
    """The history model keeps to its calendar, and what is drawn is drawn."""
    dckd_options["train"]["optim_g"]["fused"] = path == "fused"
    ours, by_hand = make(dckd_options, DCKDModel), make(dckd_options, DCKDModel)
    for iteration in range(1, 6):
        step(ours, iteration, bad=iteration == 2)
        if iteration == 2:
            before = weights(by_hand.net_g_ema)
            left_out = copy.deepcopy((by_hand.net_g.state_dict(), by_hand.optimizer_g.state_dict()))
            by_hand.ema.update = lambda *_: None
            terms, by_hand.terms["cl_opt"].after_step = by_hand.terms, lambda step: None
            step(by_hand, iteration)
            del by_hand.ema.update, terms["cl_opt"].after_step
            by_hand.net_g.load_state_dict(left_out[0])
            by_hand.optimizer_g.load_state_dict(left_out[1])
            assert equal(before, weights(by_hand.net_g_ema))
            terms["cl_opt"].after_step(by_hand.step)
        else:
            step(by_hand, iteration)
    names = ("net_g", "net_g_ema", "net_his")
    assert all(equal(weights(ours.networks()[n]), weights(by_hand.networks()[n])) for n in names)
    assert torch.equal(ours.generator.get_state(), by_hand.generator.get_state())
    assert ours.get_current_log() == by_hand.get_current_log()


def test_both_paths_agree(run_options: dict[str, Any]) -> None:
    run_options["train"].update(clip_grad_norm=0.05)
    models = []
    for fused in (True, False):
        run_options["train"]["optim_g"]["fused"] = fused
        models.append(make(run_options))
        for iteration in range(1, 8):
            step(models[-1], iteration, bad=iteration in (2, 3, 6))
    assert [model.guard.made_on_host for model in models] == [None, True]
    for on_device, on_host in zip(*(weights(m.net_g, m.net_g_ema) for m in models), strict=True):
        torch.testing.assert_close(on_device, on_host)
    assert [model.guard.state() for model in models] == [{"skipped": 3, "in_a_row": 0}] * 2


# ----------------------------------------------------------------------------------------------------- the limit


@pytest.mark.parametrize("path", PATHS)
def test_too_many_in_a_row_end_the_run_with_the_weights_from_before(
    run_options: dict[str, Any], tmp_path: Path, path: str
) -> None:
    run_options["train"]["optim_g"]["fused"] = path == "fused"
    run_options["train"]["max_nonfinite"] = 3
    run_options["path"] = {key: str(tmp_path) for key in ("models", "training_states", "experiments_root")}
    model = make(run_options)
    step(model, 1)
    before = weights(model.net_g, model.net_g_ema)
    moments = copy.deepcopy(model.optimizer_g.state_dict()["state"])

    def go_on() -> None:
        for iteration in range(
            2, 7
        ):  # two good ones at the end, which the GPU would compute before it is asked
            step(model, iteration, bad=iteration < 5)
        model.get_current_log()

    with pytest.raises(TrainingError) as raised:
        go_on()
    problems = raised.value.problems
    stopped = model.guard.iteration
    assert stopped == (6 if path == "fused" else 4)
    assert problems[0].startswith(
        "iterations 2 to 4 were not finite; their updates were skipped (train.max_nonfinite: 3). "
    )
    for advice in ("train.optim_g.lr", "train.clip_grad_norm", "precision.amp", f"{stopped}.state"):
        assert advice in problems[0]
    assert problems[1:] == [f"iteration {n}: l_pix: nan; images: {n}a.png, {n}b.png" for n in (2, 3, 4)]

    state = torch.load(tmp_path / f"{stopped}.state", weights_only=True)
    saved = state["networks"]
    assert equal([*saved["net_g"].values(), *saved["net_g_ema"].values()], before)
    for index, entry in moments.items():
        assert all(torch.equal(state["optimizers"][0]["state"][index][key], entry[key]) for key in entry)
    resumed = make(run_options)
    resumed.resume_training(state)
    assert resumed.guard.skipped.item() == 3
    for iteration in range(7, 9):  # it has as many tries again
        step(resumed, iteration, bad=True)
    step(resumed, 9)
    assert resumed.get_current_log() and resumed.guard.skipped.item() == 5
    assert not equal(weights(resumed.net_g, resumed.net_g_ema), before)


def test_the_last_save_reports_steps_without_a_line_in_the_log(
    run_options: dict[str, Any], tmp_path: Path
) -> None:
    run_options["train"]["optim_g"]["fused"] = True
    run_options["train"]["max_nonfinite"] = 2
    run_options["path"] = {key: str(tmp_path) for key in ("models", "training_states", "experiments_root")}
    model = make(run_options)
    for iteration in (1, 2):
        step(model, iteration, bad=True)
    with pytest.raises(TrainingError, match="iterations 1 to 2 were not finite"):
        model.save(-1, -1)
    assert (tmp_path / "2.state").exists() and not (tmp_path / "net_g_latest.pth").exists()


# -------------------------------------------------------------------------------------------------- clipping, fp16


def test_the_norm_is_logged_when_it_is_clipped(run_options: dict[str, Any]) -> None:
    model = make(run_options)
    step(model, 1)
    assert list(model.get_current_log()) == ["l_pix"]
    norm = torch.stack([p.grad.norm() for p in model.net_g.parameters()]).norm().item()
    run_options["train"]["clip_grad_norm"] = norm / 4
    clipped = make(run_options)
    step(clipped, 1)
    assert clipped.get_current_log() == pytest.approx({**model.get_current_log(), "grad_norm": norm})
    shortened = torch.stack([p.grad.norm() for p in clipped.net_g.parameters()]).norm().item()
    assert shortened == pytest.approx(norm / 4, rel=1e-3)  # torch adds 1e-6 below


@pytest.mark.parametrize("path", PATHS)
def test_fp16_finds_its_scale_and_trains(run_options: dict[str, Any], path: str, tmp_path: Path) -> None:
    run_options["precision"] = {"amp": "fp16"}
    run_options["train"]["optim_g"]["fused"] = path == "fused"
    run_options["path"] = {key: str(tmp_path) for key in ("models", "training_states", "experiments_root")}
    run_options["train"]["pixel_opt"] = {"type": "L1Loss", "loss_weight": 100.0}
    model = make(run_options)
    model.guard.loss_scale.factor.fill_(2.0**40)
    losses = []
    for iteration in range(1, 31):
        model.feed_data(batch(0))
        model.optimize_parameters(iteration)
        losses.append(model.log_dict["l_pix"].item())
        if model.guard.in_a_row.item() == 9:  # it starts far off, on purpose
            model.guard.try_again()
    halved = model.guard.skipped.item()
    assert 5 < halved < 30 and model.guard.loss_scale.factor.item() == 2.0 ** (40 - halved)
    assert losses[0] == losses[5] and losses[-1] < losses[0]
    model.save(0, 30)
    resumed = make(run_options)
    resumed.resume_training(torch.load(tmp_path / "30.state", weights_only=True))
    for either in (model, resumed):
        step(either, 31)
    assert resumed.guard.state() == model.guard.state() and resumed.guard.loss_scale.good_steps.item() > 1
    assert equal(weights(resumed.net_g, resumed.net_g_ema), weights(model.net_g, model.net_g_ema))


def test_fp16_agrees_with_full_precision(run_options: dict[str, Any]) -> None:
    full = make(run_options)
    run_options["precision"] = {"amp": "fp16"}
    reduced = make(run_options)
    for model in (full, reduced):
        step(model, 1)
    assert reduced.guard.skipped.item() == 0
    for ours, exact in zip(reduced.net_g.parameters(), full.net_g.parameters(), strict=True):
        assert not torch.equal(ours.grad, exact.grad)
        assert torch.cosine_similarity(ours.grad.flatten(), exact.grad.flatten(), dim=0) > 0.99
    assert reduced.get_current_log() == pytest.approx(full.get_current_log(), rel=1e-2)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("clip_grad_norm", 0, "train.clip_grad_norm: 0 is not above 0"),
        ("clip_grad_norm", -1.0, "train.clip_grad_norm: -1.0 is not above 0"),
        ("clip_grad_norm", math.nan, "train.clip_grad_norm: expected a number or null, got nan"),
        ("max_nonfinite", 0, "train.max_nonfinite: 0 is below 1"),
        ("clip_grad_norm", None, None),
        ("clip_grad_norm", 1, None),
    ],
)
@pytest.mark.parametrize("kind", [KDModel, DCKDModel])
def test_options_are_checked(kind: Any, key: str, value: Any, problem: str | None) -> None:
    found: list[str] = []
    check_section({key: value}, kind.train_options.declared(), "train", found)
    assert found == ([] if problem is None else [problem])


# -------------------------------------------------------------------------------------------------- two processes


def _train_one_rank(rank: int, options: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),  # ranks that do not agree wait for each other
    )
    for path in PATHS:
        options["train"]["optim_g"]["fused"] = path == "fused"
        torch.save(_steps_of_a_rank(rank, options), f"{folder}/{path}{rank}.pt")
    dist.destroy_process_group()


def _steps_of_a_rank(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    model = make(options, dist=True, rank=rank, world_size=2)
    history = []
    error = None
    try:
        for iteration in range(1, 9):
            bad = rank == 1 and iteration in (2, 5, 6)
            model.feed_data(batch(10 * iteration + rank, bad and iteration != 2))
            if (
                bad and iteration == 2
            ):  # a term without gradient, of which the other rank's gradients tell nothing
                model.compute_losses = lambda n: (
                    KDModel.compute_losses(model, n) | {"l_odd": torch.tensor(math.nan)}
                )
            model.optimize_parameters(iteration)
            vars(model).pop("compute_losses", None)
            history.append(weights(model.net_g, model.net_g_ema))
            if iteration % 4 == 0:
                model.get_current_log()
    except TrainingError as raised:
        error = raised.problems
    return {"history": history, "error": error, "counters": model.guard.state()}


@pytest.mark.slow
def test_ranks_agree_when_one_of_them_has_the_bad_image(run_options: dict[str, Any], tmp_path: Path) -> None:
    run_options["train"]["max_nonfinite"] = 2
    run_options["path"] = {key: str(tmp_path) for key in ("models", "training_states", "experiments_root")}
    torch.multiprocessing.start_processes(
        _train_one_rank, (run_options, str(tmp_path)), nprocs=2, start_method="spawn"
    )
    for path in PATHS:
        ranks = [torch.load(tmp_path / f"{path}{rank}.pt", weights_only=True) for rank in (0, 1)]
        histories = [rank["history"] for rank in ranks]
        assert all(equal(*pair) for pair in zip(*histories, strict=True))
        moved = [not equal(*pair) for pair in zip(histories[0], histories[0][1:], strict=False)]
        expected = [False, True, True, False, False, False, False]  # after iterations 2 to 8
        assert moved == (expected if path == "fused" else expected[:4])  # held back, or over
        assert ranks[0]["error"] == ranks[1]["error"]
        assert ranks[0]["error"][0].startswith("iterations 5 to 6 were not finite")
        assert ranks[0]["error"][1:] == [
            f"iteration {n}: l_pix: nan; images of rank 1: {n}1a.png, {n}1b.png" for n in (5, 6)
        ]
        assert ranks[0]["counters"] == ranks[1]["counters"] == {"skipped": 3, "in_a_row": 0}


# ----------------------------------------------------------------------------------------------------- whole runs

POISONED: set[str] = set()  # names of images whose pixels are not numbers


@pytest.fixture
def poison() -> Iterator[Callable[..., None]]:
    from basicsr.data.paired_image_dataset import (
        PairedImageDataset,
    )  # not above: processes start with this file
    from basicsr.utils.registry import DATASET_REGISTRY

    class WithPoison(PairedImageDataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            if Path(item["lq_path"]).stem in POISONED:
                item["lq"] = torch.full_like(item["lq"], math.nan)
            return item

    POISONED.clear()
    DATASET_REGISTRY._obj_map["WithPoison"] = WithPoison
    yield lambda *names: POISONED.update(names)
    del DATASET_REGISTRY._obj_map["WithPoison"]


@pytest.fixture
def poisoned_options(run_options: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    run_options["datasets"]["train"].update(type="WithPoison", batch_size_per_gpu=1)
    del run_options["datasets"]["val"]
    run_options["val"] = None
    run_options["train"]["total_iter"] = 12
    return run_options


def state(iteration: int, name: str) -> dict[str, Any]:
    return torch.load(f"experiments/{name}/training_states/{iteration}.state", weights_only=True)


def log_of(name: str) -> str:
    (file,) = Path(f"experiments/{name}").glob("train_*.log")
    return file.read_text(encoding="utf-8")


def test_a_run_skips_exactly_the_batches_with_the_bad_image(
    poisoned_options: dict[str, Any], poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned_options["logger"].update(print_freq=5, save_checkpoint_freq=12)
    poison("cat")
    poisoned_options["name"] = "guarded"
    assert run(poisoned_options) == 0

    POISONED.clear()
    poisoned_options["name"] = "by_hand"
    original = KDModel.optimize_parameters

    def without_the_cat(self: KDModel, iteration: int) -> None:
        if "cat" in self.images[0]:
            self.optimizer_g.step = self.ema.update = lambda *_: None  # type: ignore
        original(self, iteration)
        vars(self.ema).pop("update", None)
        vars(self.optimizer_g).pop("step", None)

    monkeypatch.setattr(KDModel, "optimize_parameters", without_the_cat)
    assert run(poisoned_options) == 0
    guarded, by_hand = state(12, "guarded"), state(12, "by_hand")
    for name in ("net_g", "net_g_ema"):
        assert equal([*guarded["networks"][name].values()], [*by_hand["networks"][name].values()])
    for ours, theirs in zip(*(s["optimizers"][0]["state"].values() for s in (guarded, by_hand)), strict=True):
        assert ours["step"].item() == 9 and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert guarded["extra"]["guard"] == {"skipped": 3, "in_a_row": 0}
    lines = [line for line in log_of("guarded").splitlines() if "Update skipped" in line]
    assert [line.split("Update skipped, ")[1].split(" ")[0] for line in lines] == ["1", "2", "3"]
    assert all(
        " WARNING: " in line and line.endswith("LR_x4/cat.png") and "l_pix: nan" in line for line in lines
    )
    assert "Update skipped" not in log_of("by_hand")


def test_a_run_that_learns_nothing_ends_and_goes_on_when_it_can(
    poisoned_options: dict[str, Any], poison: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned_options["logger"].update(print_freq=1, save_checkpoint_freq=100)
    poison("astronaut", "cat", "coffee", "rocket")
    assert run(poisoned_options, "--auto_resume") == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "kdsr: error: iterations 1 to 10 were not finite" in error
    assert error.count("kdsr: error: iteration ") == 10 and "rocket.png" in error
    stopped = state(10, "run")
    POISONED.clear()
    assert run(poisoned_options, "--auto_resume") == 0
    assert state(10, "run")["iter"] == stopped["iter"] == 10
    latest = torch.load("experiments/run/models/net_g_latest.pth", weights_only=True)["params"]
    assert not equal([*latest.values()], [*stopped["networks"]["net_g"].values()])
    assert not stopped["optimizers"][0]["state"]  # no update was ever made


def test_a_rehearsal_that_is_not_finite_ends_nothing(
    poisoned_options: dict[str, Any], poison: Callable[..., None]
) -> None:
    poison("astronaut", "cat", "coffee", "rocket")
    poisoned_options["train"].update(max_nonfinite=1)
    assert run(poisoned_options) == 1
    assert "in iteration 1: l_pix: nan" in log_of(
        "run"
    )  # the run's own first step ended it: a rehearsal has no log
    assert state(1, "run")["iter"] == 1


def test_a_learning_rate_that_is_far_too_high(
    poisoned_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned_options["datasets"]["train"]["type"] = "PairedImageDataset"
    poisoned_options["logger"].update(print_freq=4, save_checkpoint_freq=1, keep_last=20)
    poisoned_options["train"]["optim_g"]["lr"] = 1e20
    assert run(poisoned_options) == 1
    assert "iterations 2 to 11 were not finite" in capsys.readouterr().err
    first, last = (state(iteration, "run")["networks"] for iteration in (1, 11))
    for name in ("net_g", "net_g_ema"):
        assert equal([*first[name].values()], [*last[name].values()])
