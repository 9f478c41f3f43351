"""Which state a run goes on from, what it says of changed options, and which checkpoints it keeps."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from basicsr.utils.lmdb_util import make_lmdb_from_imgs

from kdsr.models.validator import Validator
from kdsr.pipeline.resume import changes, fingerprint_of_set, newest_state, run_record
from kdsr.runtime.errors import CheckpointError
from small_runs import run

Options = dict[str, Any]
RUN = Path("experiments/run")


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names(folder: str) -> set[str]:
    return {path.name for path in (RUN / folder).iterdir()}


def state(iteration: int) -> dict[str, Any]:
    return torch.load(RUN / f"training_states/{iteration}.state", weights_only=True)


def rows() -> list[tuple[str, ...]]:
    with (RUN / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [tuple(row) for row in csv.reader(file)]


def log() -> str:
    return sorted(RUN.glob("train_*.log"), key=lambda path: path.stat().st_mtime_ns)[-1].read_text("utf-8")


# ----------------------------------------------------------------------------------------------- kept checkpoints


def test_the_last_three_are_kept(run_options: Options) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 1
    run_options["train"]["total_iter"] = 6
    assert run(run_options) == 0
    assert names("training_states") == {"4.state", "5.state", "6.state"}
    assert names("models") == {"net_g_4.pth", "net_g_5.pth", "net_g_6.pth", "net_g_latest.pth"}


@pytest.mark.parametrize(("keep", "left"), [(1, {4}), (0, {1, 2, 3, 4}), (None, {1, 2, 3, 4})])
def test_the_given_number_of_states_is_kept(run_options: Options, keep: int | None, left: set[int]) -> None:
    run_options["logger"].update(save_checkpoint_freq=1, keep_last=keep)
    run_options["train"]["total_iter"] = 4
    assert run(run_options) == 0
    assert names("training_states") == {f"{iteration}.state" for iteration in left}


def test_the_state_that_a_run_resumes_from_is_kept(run_options: Options) -> None:
    run_options["logger"].update(save_checkpoint_freq=1, keep_last=2)
    run_options["train"]["total_iter"] = 2
    assert run(run_options) == 0
    run_options["train"]["total_iter"] = 6
    assert run(run_options, "--auto_resume") == 0
    assert names("training_states") == {"2.state", "5.state", "6.state"}
    assert {"net_g_2.pth", "net_g_5.pth", "net_g_6.pth"} <= names("models")


def test_the_best_checkpoint_is_that_of_the_best_validation(run_options: Options) -> None:
    run_options["logger"].update(save_best={"set": "held_out", "metric": "psnr"}, keep_last=1)
    run_options["logger"]["save_checkpoint_freq"] = 1
    run_options["val"]["val_freq"] = 1
    # a learning rate that ruins the student after the third step
    run_options["train"].update(total_iter=5, ema_decay=0)
    run_options["train"]["scheduler"] = {"type": "MultiStepLR", "milestones": [3], "gamma": 3000.0}
    assert run(run_options) == 0
    mean: dict[int, list[float]] = {}
    for iteration, network, _, _, _, value in rows()[1:]:
        if network == "baseline":
            continue
        mean.setdefault(int(iteration), []).append(float(value))
    best = max(mean, key=lambda iteration: sum(mean[iteration]))
    assert best < 5  # else there was nothing to keep
    kept = torch.load(RUN / "models/net_g_best.pth", weights_only=True)
    assert kept["measured"]["iteration"] == best
    assert kept["measured"]["value"] == pytest.approx(sum(mean[best]) / 4, abs=1e-12)
    run_options["train"].update(total_iter=best)
    assert run(run_options) == 0  # again, only so far
    last = torch.load(RUN / "models/net_g_latest.pth", weights_only=True)
    assert all(torch.equal(value, kept["params"][name]) for name, value in last["params"].items())


def test_the_best_so_far_stays_the_best_when_a_metric_comes_or_goes(run_options: Options) -> None:
    """The first validation is the best one; afterwards a learning rate ruins the student."""
    run_options["logger"].update(save_best={"set": "held_out", "metric": "psnr"}, save_checkpoint_freq=1)
    run_options["val"]["val_freq"] = 1
    run_options["train"].update(total_iter=2, ema_decay=0)
    run_options["train"]["scheduler"] = {"type": "MultiStepLR", "milestones": [1], "gamma": 3000.0}
    metrics = run_options["val"]["metrics"]
    assert run(run_options) == 0
    best = torch.load(RUN / "models/net_g_best.pth", weights_only=True)["measured"]
    assert best["iteration"] == 1
    metrics["ssim"] = {"type": "calculate_ssim", "crop_border": 4, "test_y_channel": True}
    run_options["train"]["total_iter"] = 3
    assert run(run_options, "--auto_resume") == 0
    assert torch.load(RUN / "models/net_g_best.pth", weights_only=True)["measured"] == best
    del metrics["ssim"]
    run_options["train"]["total_iter"] = 4
    assert run(run_options, "--auto_resume") == 0
    values = state(4)["best_metric_results"]["held_out"]
    assert values == {"psnr": {"better": "higher", "val": best["value"], "iter": 1}}
    del run_options["val"]["metrics"], run_options["logger"]["save_best"]
    assert run(run_options, "--auto_resume") == 0


@pytest.mark.parametrize(
    ("best", "message"),
    [
        (
            {"set": "Set5", "metric": "psnr"},
            "logger.save_best.set: 'Set5' is not the name of a validation set",
        ),
        (
            {"set": "held_out", "metric": "pnsr"},
            "logger.save_best.metric: 'pnsr' is not in val.metrics; did you",
        ),
        ({"set": "held_out"}, "logger.save_best.metric: None is not in val.metrics; valid: psnr"),
    ],
)
def test_a_best_checkpoint_by_what_is_not_measured(
    run_options: Options, best: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["logger"]["save_best"] = best
    assert run(run_options) == 2
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- which state


def test_a_state_without_its_weights_is_skipped(
    run_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 1
    assert run(run_options) == 0
    (RUN / "models/net_g_3.pth").unlink()
    assert run(run_options, "--auto_resume") == 0
    assert "Skipped a state whose weights are missing" in log() and "net_g_3.pth" in log()
    assert "Resuming training from epoch: 1, iter: 2" in capsys.readouterr().err


def test_a_signal_while_the_newest_state_is_read_is_not_taken_for_damage(
    run_options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 2
    assert run(run_options) == 0
    load = torch.load

    def load_state(path: Any, *arguments: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", load_state)
        assert run(run_options, "--auto_resume") == 128 + signal.SIGTERM
    assert "stopped by SIGTERM before the first iteration" in capsys.readouterr().err
    assert [path.name for path in Path("experiments").iterdir()] == ["run"]  # not begun anew
    assert names("training_states") == {"2.state"}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_state_that_cannot_be_opened_is_not_taken_for_damage() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = Path(folder, "5.state")
        file.write_bytes(b"")
        file.chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(CheckpointError, match="5.state: cannot be opened .Permission denied"):
                newest_state(Path(folder), Path(folder))
        finally:
            os.seteuid(0)
        assert newest_state(Path(folder), Path(folder))[0] is None


def test_temporary_files_of_a_killed_writer_are_removed(run_options: Options) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 2
    assert run(run_options) == 0
    left = [RUN / "models/.net_g_4.pth.77.tmp", RUN / "training_states/.4.state.77.tmp"]
    for file in left:
        file.write_bytes(b"half")
    assert run(run_options, "--auto_resume") == 0
    assert not any(file.exists() for file in left)


def test_going_back_to_an_older_state_sets_the_later_ones_aside(run_options: Options) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 1
    run_options["val"]["val_freq"] = 1
    assert run(run_options) == 0
    whole = {name: state(3)["networks"]["net_g"][name].clone() for name in state(3)["networks"]["net_g"]}
    before = rows()
    assert run(run_options, "--force_yml", f"path:resume_state={RUN}/training_states/1.state") == 0
    assert {"2.state.set_aside", "3.state.set_aside"} <= names("training_states")
    assert "3.state is later than the state that the run resumes from: set aside" in log()
    assert all(torch.equal(value, whole[name]) for name, value in state(3)["networks"]["net_g"].items())
    assert rows() == before


def test_later_states_are_set_aside_however_the_state_is_named(run_options: Options) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 1
    assert run(run_options) == 0
    run_options["train"]["total_iter"] = 2
    other = f"path:resume_state={RUN}/models/../training_states/1.state"
    assert run(run_options, "--force_yml", other) == 0
    later = {"2.state.set_aside", "3.state.set_aside"}
    assert names("training_states") == {"1.state", "2.state", *later}


def test_a_run_starts_from_the_named_state_and_resumes_from_its_own(run_options: Options) -> None:
    """As a batch script does it, whose line is the same each time."""
    run_options["logger"]["save_checkpoint_freq"] = 1
    assert run(run_options) == 0
    run_options.update(name="branch", path={"resume_state": f"{RUN}/training_states/2.state"})
    whole = (RUN / "training_states/3.state").read_bytes()
    folder = Path("experiments/branch/training_states")
    assert run(run_options, "--auto_resume") == 0
    assert [path.name for path in folder.iterdir()] == ["3.state"]  # and not 1 and 2 once more
    made, there = (torch.load(file, weights_only=True) for file in (folder / "3.state", io.BytesIO(whole)))
    weights = made["networks"]["net_g"]
    assert all(torch.equal(value, weights[name]) for name, value in there["networks"]["net_g"].items())
    run_options["train"]["total_iter"] = 4
    assert run(run_options, "--auto_resume") == 0
    assert {path.name for path in folder.iterdir()} == {"3.state", "4.state"}
    log = sorted(Path("experiments/branch").glob("*.log"))[-1].read_text(encoding="utf-8")
    assert "2.state is not used, --auto_resume resumes from" in log


@pytest.mark.parametrize("flags", [[], ["--auto_resume"]])
def test_a_new_run_does_not_start_from_files_in_its_own_folder(
    run_options: Options, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(run_options) == 0
    run_options["path"]["pretrain_network_g"] = f"{RUN}/models/net_g_latest.pth"
    assert run(run_options, *flags) == 2
    assert "is in the folder of this run" in capsys.readouterr().err
    assert [path.name for path in Path("experiments").iterdir()] == ["run"]


# ------------------------------------------------------------------------------------------ validations that are due


def test_a_missing_validation_of_the_killed_run_is_made_at_resume(
    run_options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed between the save of iteration 2 and the end of its validation."""
    run_options["logger"]["save_checkpoint_freq"] = 2
    run_options["logger"]["save_best"] = {"set": "held_out", "metric": "psnr"}
    run_options["val"]["val_freq"] = 2
    run_options["train"]["total_iter"] = 5
    assert run(run_options) == 0
    whole, best = rows(), state(4)["best_metric_results"]

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    shutil.rmtree(RUN)
    with monkeypatch.context() as patch:
        patch.setattr(Validator, "record", die)
        with pytest.raises(Killed):
            run(run_options)
    assert not (RUN / "metrics.csv").exists()
    assert run(run_options, "--auto_resume") == 0
    assert rows() == whole
    assert state(4)["best_metric_results"] == best


def test_a_best_value_measured_after_the_state_was_saved_is_not_lost(run_options: Options) -> None:
    """The state of iteration 2 was saved before its validation, which is in metrics.csv."""
    run_options["logger"]["save_checkpoint_freq"] = 2
    run_options["val"]["val_freq"] = 2
    run_options["train"]["total_iter"] = 2
    assert run(run_options) == 0
    assert state(2)["best_metric_results"] == {}
    run_options["train"]["total_iter"] = 4
    run_options["train"]["optim_g"]["lr"] = 10.0  # nothing later is better
    assert run(run_options, "--auto_resume") == 0
    assert state(4)["best_metric_results"]["held_out"]["psnr"]["iter"] == 2
    assert len(rows()) == 1 + 3 * 4  # baseline, 2 and 4


def test_tensorboard_gets_every_image(run_options: Options) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_options["logger"]["use_tb_logger"] = True
    run_options["val"]["val_freq"] = 3
    assert run(run_options) == 0
    events = EventAccumulator("tb_logger/run")
    events.Reload()
    expected = {f"images/held_out/psnr/{row[3]}": float(row[5]) for row in rows()[1:] if row[1] == "student"}
    assert len(expected) == 4
    for tag, value in expected.items():
        (event,) = events.Scalars(tag)
        assert event.step == 3 and event.value == pytest.approx(value, rel=1e-6)


# --------------------------------------------------------------------------------------------------- changed options


def test_changed_options_are_listed_with_their_effect(run_options: Options) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 3
    assert run(run_options) == 0
    run_options["train"].update(total_iter=6, ema_decay=0.5)
    run_options["train"]["optim_g"]["lr"] = 5e-4
    run_options["train"]["pixel_opt"]["loss_weight"] = 2.0
    run_options["datasets"]["train"]["batch_size_per_gpu"] = 4
    run_options["manual_seed"] = 8
    assert run(run_options, "--auto_resume") == 0
    text = log()
    for line in (
        "train.total_iter: 3 -> 6; the new value applies from here on",
        "train.ema_decay: 0.9 -> 0.5; the new value applies",
        "train.optim_g.lr: 0.001 -> 0.0005; the new value applies, to the schedule from its beginning",
        "train.pixel_opt.loss_weight: 1.0 -> 2.0; the new value applies",
        "datasets.train.batch_size_per_gpu: 2 -> 4; the new value applies",
        "manual_seed: 3 -> 8; the new seed gives the order of the data",
    ):
        assert line in text
    assert state(6)["optimizers"][0]["param_groups"][0]["lr"] == 5e-4


def test_unchanged_options_are_not_listed(run_options: Options) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 1
    assert run(run_options, "--force_yml", "train:total_iter=3.0") == 0
    (RUN / "training_states/3.state").unlink()
    assert run(run_options, "--auto_resume") == 0
    assert " -> " not in log()


def test_a_changed_schedule_applies_from_its_beginning(run_options: Options) -> None:
    run_options["logger"]["save_checkpoint_freq"] = 1
    run_options["train"].update(total_iter=4, warmup_iter=2)
    assert run(run_options) == 0
    new = {"type": "MultiStepLR", "milestones": [2, 5], "gamma": 0.1}
    run_options["train"].update(total_iter=7, scheduler=new)
    assert run(run_options, "--auto_resume") == 0
    resumed = state(7)["optimizers"][0]["param_groups"][0]["lr"]
    assert run(run_options) == 0  # a new run
    assert resumed == state(7)["optimizers"][0]["param_groups"][0]["lr"]
    assert resumed < 1e-4


def test_another_network_or_teacher_is_refused(
    dckd_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    dckd_options["logger"]["save_checkpoint_freq"] = 2
    assert run(dckd_options) == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in RUN.rglob("*"))
    teacher = torch.load("teacher.pth", weights_only=True)
    teacher["params"]["conv_first.weight"] += 1
    torch.save(teacher, "other.pth")
    dckd_options["path"]["pretrain_network_t"] = "other.pth"
    dckd_options["network_g"]["res_scale"] = 0.5
    dckd_options["train"]["total_iter"] = 4
    assert run(dckd_options, "--auto_resume") == 2
    error = capsys.readouterr().err
    assert "network_g.res_scale: (not there) -> 0.5; the state holds another network" in error
    assert "path.pretrain_network_t: the weights have changed" in error
    assert "or resume anyway with --force_resume" in error
    assert sorted((path, path.stat().st_mtime_ns) for path in RUN.rglob("*")) == before
    assert run(dckd_options, "--auto_resume", "--force_resume") == 0
    assert "path.pretrain_network_t: the weights have changed" in log()


def test_a_state_of_another_network_is_not_a_list_of_names(
    run_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    """A case without optimizer state: SGD, with as many parameters."""
    run_options["logger"]["save_checkpoint_freq"] = 1
    run_options["train"]["optim_g"] = {"type": "SGD", "lr": 1e-4}
    assert run(run_options) == 0
    run_options["network_g"] = {"type": "MSRResNet", "num_feat": 8, "num_block": 1, "upscale": 4}
    capsys.readouterr()
    assert run(run_options, "--auto_resume", "--force_resume") == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if "kdsr: error" in line)
    assert (
        "3.state: net_g does not fit MSRResNet: it looks like EDSR; 8 of the network's 14 tensors match"
        in error
    )
    assert len(error) < 500


def test_other_weights_of_the_teachers_file_are_another_teacher(
    dckd_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    file = dckd_options["path"]["pretrain_network_t"]
    params = torch.load(file, weights_only=True)["params"]
    torch.save({"params": params, "params_ema": {name: 2 * value for name, value in params.items()}}, file)
    dckd_options["logger"]["save_checkpoint_freq"] = 3
    assert run(dckd_options) == 0
    dckd_options["path"].update(param_key_t="params", param_key_g="auto")  # the default; of no effect
    assert run(dckd_options, "--auto_resume") == 0
    assert "path.param_key_g: (not there) -> auto; no effect, the state's weights are used" in log()
    dckd_options["path"]["param_key_t"] = "params_ema"
    assert run(dckd_options, "--auto_resume") == 2
    assert (
        "path.param_key_t: (not there) -> params_ema; these may be other weights of the same file"
        in capsys.readouterr().err
    )
    assert run(dckd_options, "--auto_resume", "--force_resume") == 0


def test_a_teacher_that_has_only_moved_is_the_same(dckd_options: Options) -> None:
    dckd_options["logger"]["save_checkpoint_freq"] = 2
    assert run(dckd_options) == 0
    shutil.move("teacher.pth", "moved.pth")
    dckd_options["path"]["pretrain_network_t"] = "moved.pth"
    dckd_options["train"]["total_iter"] = 4
    assert run(dckd_options, "--auto_resume") == 0
    assert "moved.pth; the same weights" in log()


def test_other_training_images_are_refused(
    run_options: Options, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, "data")
    for key in ("gt", "lq"):
        folder = "GT" if key == "gt" else "LR_x4"
        run_options["datasets"]["train"][f"dataroot_{key}"] = f"data/{folder}"
    run_options["logger"]["save_checkpoint_freq"] = 3
    assert run(run_options) == 0
    image = cv2.imread("data/LR_x4/cat.png")
    cv2.imwrite("data/LR_x4/cat.png", image // 2)
    run_options["train"]["total_iter"] = 6
    assert run(run_options, "--auto_resume") == 2
    assert "datasets.train: the images have changed" in capsys.readouterr().err
    assert run(run_options, "--auto_resume", "--force_resume") == 0


@pytest.mark.parametrize("first", ["a folder of files", "an LMDB"])
def test_a_folder_that_became_an_lmdb_is_named_as_such(
    run_options: Options, photos: Path, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And vice versa. With the same images and --force_resume the run continues to the same bits."""
    roots = {"dataroot_gt": str(photos / "GT"), "dataroot_lq": str(photos / "LR_x4")}
    kinds = {
        "a folder of files": roots | {"io_backend": {"type": "disk"}},
        "an LMDB": {"io_backend": {"type": "lmdb"}},
    }
    for key, folder in roots.items():
        names = sorted(os.listdir(folder))
        kinds["an LMDB"][key] = f"{Path(folder).name}.lmdb"
        make_lmdb_from_imgs(folder, kinds["an LMDB"][key], names, [name[:-4] for name in names])
    second = next(kind for kind in kinds if kind != first)
    run_options["logger"]["save_checkpoint_freq"] = 3
    train = run_options["datasets"]["train"]
    train.update(kinds[first])
    run_options["train"]["total_iter"] = 6
    assert run(run_options) == 0
    expected = torch.load(RUN / "models/net_g_latest.pth", weights_only=True)["params"]
    for file in ("models/net_g_6.pth", "training_states/6.state"):
        (RUN / file).unlink()
    train.update(kinds[second])
    capsys.readouterr()
    assert run(run_options, "--auto_resume") == 2
    error = capsys.readouterr().err
    assert "datasets.train: the images have changed" in error
    assert "; dataroot_gt: " in error and "; dataroot_lq: " in error
    assert f"it was {first} and is {second} now, which cannot be compared" in error
    assert run(run_options, "--auto_resume", "--force_resume") == 0
    assert f"it was {first} and is {second} now" in log()
    ended = torch.load(RUN / "models/net_g_latest.pth", weights_only=True)["params"]
    assert all(torch.equal(ended[name], expected[name]) for name in expected)


def test_a_set_that_has_moved_has_the_same_fingerprint(run_options: Options, photos: Path) -> None:
    from basicsr.data.paired_image_dataset import PairedImageDataset

    def fingerprint(root: Path) -> str:
        opt = {**run_options["datasets"]["train"], "phase": "train", "scale": 4}
        opt.update(dataroot_gt=str(root / "GT"), dataroot_lq=str(root / "LR_x4"))
        opt["io_backend"] = dict(opt["io_backend"])
        return fingerprint_of_set(PairedImageDataset(opt))

    shutil.copytree(photos, "moved")
    assert fingerprint(Path("moved")) == fingerprint(photos)
    for folder in ("GT", "LR_x4"):
        Path(f"moved/{folder}/cat.png").rename(f"moved/{folder}/dog.png")
    assert fingerprint(Path("moved")) != fingerprint(photos)


def test_a_state_without_options_is_not_compared() -> None:
    class Empty:
        opt: dict[str, Any] = {}

        def __len__(self) -> int:
            return 0

    record = run_record({"name": "run"}, Empty())
    (line,) = changes({"iter": 1}, record, "7.state")
    assert "nothing was compared" in line
