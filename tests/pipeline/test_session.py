"""Whole runs through BasicSR's loop: exact lengths, resume, what is refused before anything is written."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ranks
from kdsr import train as train_entry
from kdsr.deploy.network_file import DESCRIBED
from kdsr.models import evaluation
from kdsr.pipeline import run_data
from kdsr.pipeline.session import Session
from small_runs import run


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(iteration: int | str = "latest", name: str = "run") -> dict[str, Any]:
    return torch.load(f"experiments/{name}/models/net_g_{iteration}.pth", weights_only=True)


def validations(name: str = "run") -> list[tuple[str, str, str]]:
    with open(f"experiments/{name}/metrics.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] != "baseline"]
    return [(row["iteration"], row["network"], row["image"]) for row in rows]


IMAGES = ["astronaut", "cat", "coffee", "rocket"]


@pytest.mark.parametrize(("ratio", "total"), [(1, 7), (3, 7), (1, 2), (2.5, 5)])
def test_a_run_makes_exactly_total_iter_steps(
    run_options: dict[str, Any], ratio: float, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 images and batches of 3: drop_last loses an image per epoch, and BasicSR's count of epochs is too small."""
    from kdsr.models.kd_model import KDModel

    steps = []
    original = KDModel.optimize_parameters
    monkeypatch.setattr(
        KDModel, "optimize_parameters", lambda self, n: (steps.append(n), original(self, n))[1]
    )
    run_options["datasets"]["train"].update(batch_size_per_gpu=3, dataset_enlarge_ratio=ratio)
    run_options["train"]["total_iter"] = total
    assert run(run_options) == 0
    assert steps == [1, *range(1, total + 1)]  # the rehearsal's, then the run's
    assert set(saved()) - DESCRIBED == {"params", "params_ema"}
    assert validations() == [(str(total), "student", image) for image in IMAGES]


def test_fewer_images_than_a_batch_is_an_error(
    run_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["datasets"]["train"]["batch_size_per_gpu"] = 5
    assert run(run_options) == 2
    assert "4 images × dataset_enlarge_ratio 1 are fewer than one batch of 5" in capsys.readouterr().err
    assert not Path("experiments").exists()


def scarce_memory(rank: int = 0) -> None:
    """Room for the decoded images of one process: four fifths are 120,000 bytes, and the images take 117,504."""
    run_data.free_shared_memory = lambda: 150_000  # type: ignore[attr-defined]


def test_cached_images_must_fit_into_the_memory_of_the_node(
    run_options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone the process has room; as one of two on a node it has not; and with less it has not either."""
    run_options["datasets"]["train"]["cache"] = "ram"
    run_options["train"]["total_iter"] = 1
    monkeypatch.setattr(run_data, "free_shared_memory", lambda: 140_000)
    assert run(run_options) == 2
    assert "datasets.train.cache: ram needs 0.0 GiB of shared memory, but may take" in capsys.readouterr().err
    assert not Path("experiments").exists()
    assert ranks.run(Path(), ["-opt", "run.yml", "--launcher", "pytorch"], prepare=scarce_memory) == [2, 2]
    for rank in range(2):
        assert "for each of 2 processes on " in Path(f"rank_{rank}.log").read_text()
    assert not Path("experiments").exists()
    monkeypatch.setattr(run_data, "free_shared_memory", lambda: 150_000)
    assert run(run_options) == 0


def test_an_epoch_that_does_not_fit_into_memory(
    run_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["datasets"]["train"]["dataset_enlarge_ratio"] = 1e10
    assert run(run_options) == 2
    assert "lower dataset_enlarge_ratio" in capsys.readouterr().err


def test_auto_resume_restores_everything_that_dckd_trains(dckd_options: dict[str, Any]) -> None:
    dckd_options["logger"]["save_checkpoint_freq"] = 2
    dckd_options["val"].update(teacher=True, val_freq=2)
    dckd_options["train"]["total_iter"] = 2
    assert run(dckd_options, "--auto_resume") == 0
    first = torch.load("experiments/run/training_states/2.state", weights_only=True)

    dckd_options["train"]["total_iter"] = 4
    assert run(dckd_options, "--auto_resume") == 0
    state = torch.load("experiments/run/training_states/4.state", weights_only=True)
    assert set(state["networks"]) == {"net_g", "net_g_ema", "net_his"}
    assert state["iter"] == 4
    steps = [entry["step"].item() for entry in state["optimizers"][0]["state"].values()]
    assert steps == [4] * len(steps)  # Adam counted on
    moved = (
        state["networks"]["net_his"]["conv_first.weight"] - first["networks"]["net_his"]["conv_first.weight"]
    )
    assert moved.abs().sum() > 0
    # the teacher was validated once, at the very start; the student after each two iterations
    expected = [("0", "teacher"), ("2", "student"), ("4", "student")]
    assert validations() == [(*row, image) for row in expected for image in IMAGES]
    assert list(Path("experiments").iterdir()) == [Path("experiments/run")]  # nothing was put aside


@pytest.mark.parametrize(("workers", "stop"), [(0, 3), (1, 3), (0, 4)])
def test_a_resumed_run_ends_in_the_same_bits(dckd_options: dict[str, Any], workers: int, stop: int) -> None:
    """Stopped in mid-epoch and at an epoch's end; SwinIR draws its stochastic depth from torch's global generator."""
    dckd_options["network_g"] = {
        "type": "SwinIR", "upscale": 4, "img_size": 16, "window_size": 8, "depths": [2], "embed_dim": 12,
        "num_heads": [2], "mlp_ratio": 2, "upsampler": "pixelshuffledirect", "resi_connection": "1conv",
        "drop_path_rate": 0.5,
    }  # fmt: skip
    dckd_options["datasets"]["train"].update(dataset_enlarge_ratio=2, num_worker_per_gpu=workers)
    dckd_options["logger"]["save_checkpoint_freq"] = 1
    dckd_options["train"]["total_iter"] = 6
    assert run(dckd_options, "--force_yml", "name=whole") == 0
    dckd_options["train"]["total_iter"] = stop
    assert run(dckd_options, "--force_yml", "name=parted") == 0
    dckd_options["train"]["total_iter"] = 6
    assert run(dckd_options, "--auto_resume", "--force_yml", "name=parted") == 0
    whole, parted = (
        torch.load(f"experiments/{name}/training_states/6.state", weights_only=True)
        for name in ("whole", "parted")
    )
    for network, weights in whole["networks"].items():
        for name, value in weights.items():
            assert torch.equal(parted["networks"][network][name], value), (network, name)
    first, second = (state["optimizers"][0]["state"] for state in (whole, parted))
    assert all(torch.equal(first[key]["exp_avg_sq"], second[key]["exp_avg_sq"]) for key in first)


def test_a_resume_with_longer_epochs_still_makes_every_step(run_options: dict[str, Any]) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 3
    assert run(run_options) == 0
    run_options["datasets"]["train"]["dataset_enlarge_ratio"] = 10
    run_options["train"]["total_iter"] = 6
    assert run(run_options, "--auto_resume") == 0
    assert torch.load("experiments/run/training_states/6.state", weights_only=True)["iter"] == 6
    # and once more, when there is nothing left to do: no validation twice
    assert run(run_options, "--auto_resume") == 0
    assert validations() == [(str(n), "student", image) for n in (3, 6) for image in IMAGES]


def test_a_state_of_another_optimizer(
    run_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 1
    assert run(run_options) == 0
    run_options["train"].update(optim_g={"type": "SGD", "lr": 0.1}, total_iter=4)
    assert run(run_options, "--auto_resume") == 2
    assert "another optimizer than SGD" in capsys.readouterr().err


def test_resume_takes_the_newest_state_that_loads(
    run_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 1
    assert run(run_options) == 0
    newest = Path("experiments/run/training_states/3.state")
    newest.write_bytes(newest.read_bytes()[:200])
    run_options["train"]["total_iter"] = 4
    assert run(run_options, "--auto_resume") == 0
    captured = capsys.readouterr()
    assert "3.state" in captured.err and "does not load" in captured.err
    assert "Resuming training from epoch: 1, iter: 2" in captured.err


def test_the_resolved_file_runs_alone_from_the_runs_folder(run_options: dict[str, Any]) -> None:
    assert run(run_options, "--force_yml", "train:total_iter=1") == 0
    assert train_entry.main(["-opt", "experiments/run/run.yml"]) == 0
    assert validations() == [("1", "student", image) for image in IMAGES]


def test_a_checkpoint_of_another_shape_puts_no_run_aside(
    dckd_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dckd_options) == 0
    before = sorted(Path("experiments").rglob("*"))
    dckd_options["network_t"]["num_feat"] = 16
    assert run(dckd_options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "path.pretrain_network_t" in error and "conv_first.weight (12, 3, 3, 3) in the file" in error
    assert sorted(Path("experiments").rglob("*")) == before


def test_init_from_the_teacher_takes_its_matching_blocks(dckd_options: dict[str, Any]) -> None:
    dckd_options["network_g"].update(num_feat=12)
    dckd_options["path"]["init_from"] = "teacher"
    dckd_options["train"].update(total_iter=1, optim_g={"type": "SGD", "lr": 0.0})
    assert run(dckd_options) == 0
    teacher = torch.load(dckd_options["path"]["pretrain_network_t"], weights_only=True)["params"]
    student = saved()["params"]
    assert all(torch.equal(value, teacher[name]) for name, value in student.items())
    assert len(student) < len(teacher)


def test_init_from_a_student_of_another_scale(
    run_options: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    assert run(run_options, "--force_yml", "name=x4") == 0
    x4 = saved(name="x4")["params_ema"]
    run_options.update(scale=2)
    run_options["network_g"]["upscale"] = 2
    for dataset in run_options["datasets"].values():
        dataset["dataroot_lq"] = str(photos / "LR_x2")
    run_options["path"]["init_from"] = "experiments/x4/models/net_g_latest.pth"
    run_options["train"].update(total_iter=1, optim_g={"type": "SGD", "lr": 0.0})
    assert run(run_options, "--force_yml", "name=x2") == 0
    x2 = saved(name="x2")["params"]
    assert torch.equal(x2["body.0.conv1.weight"], x4["body.0.conv1.weight"])
    assert set(x2) < set(x4)


def test_init_from_what_has_nothing_in_common(
    dckd_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    dckd_options["path"]["init_from"] = "teacher"
    assert run(dckd_options) == 2
    assert "path.init_from: nothing of teacher fits" in capsys.readouterr().err


def test_an_unreadable_image_stops_the_run_with_its_path(
    run_options: dict[str, Any], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(photos, tmp_path / "damaged")
    damaged = tmp_path / "damaged" / "LR_x4" / "cat.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(
        whole[:80] + bytes(len(whole) - 80)
    )  # the header says what it should: found when it is read
    train = run_options["datasets"]["train"]
    train.update(
        dataroot_gt=str(tmp_path / "damaged/GT"), dataroot_lq=str(tmp_path / "damaged/LR_x4"),
        num_worker_per_gpu=1, prefetch_mode="cpu", batch_size_per_gpu=4,
    )  # fmt: skip
    assert run(run_options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("kdsr: error: ") and str(damaged) in error


# -------------------------------------------------------------------------------- stopped before the first iteration


def stop_rank_0_where_it_looks_for_a_state(rank: int) -> None:
    find = Session._find_state

    def find_state(self: Session, opt: dict[str, Any]) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return find(self, opt)

    Session._find_state = find_state  # type: ignore[method-assign]


def stop_rank_0_where_the_teacher_is_measured(rank: int) -> None:
    measure = evaluation._measured

    def evaluate_one(*arguments: Any) -> Any:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments)

    evaluation._measured = evaluate_one


@pytest.mark.slow
@pytest.mark.parametrize(
    "prepare", [stop_rank_0_where_it_looks_for_a_state, stop_rank_0_where_the_teacher_is_measured]
)
def test_a_rank_that_is_stopped_before_the_training_keeps_no_other_waiting(
    prepare: Any, dckd_options: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing was saved, so that no exit code is that of a run that was stopped in order (75)."""
    dckd_options["datasets"]["train"]["batch_size_per_gpu"] = 1
    dckd_options["val"]["teacher"] = True
    (tmp_path / "run.yml").write_text(yaml.safe_dump(dckd_options, sort_keys=False), encoding="utf-8")
    assert ranks.run(tmp_path, ["-opt", "run.yml"], prepare=prepare) == [143, 1]
