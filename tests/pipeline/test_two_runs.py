"""Two runs with one folder: the second is refused before it moves, reads or writes anything."""

from __future__ import annotations

import itertools
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import ranks
from faults.conftest import vqgan_options  # noqa: F401  a fixture
from faults.lives import Life
from kdsr import test as test_entry
from kdsr.data.seeded_dataset import SeededDataset
from kdsr.runtime import run_lock
from kdsr.runtime.run_lock import RunLock
from small_runs import run

Options = dict[str, Any]
COMMAND = ["-opt", "run.yml"]
ENDLESS = ["--force_yml", "train:total_iter=1000000"]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, run_options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_options["datasets"]["train"]["dataset_enlarge_ratio"] = 4
    run_options["logger"]["save_checkpoint_freq"] = 4
    write(run_options)


def write(options: Options) -> None:
    Path("run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")


@contextmanager
def running(*lives: Life) -> Iterator[None]:
    try:
        yield
    finally:
        for life in lives:
            life.kill()


def stop(life: Life) -> None:
    assert life.process.pid
    os.kill(life.process.pid, signal.SIGTERM)
    assert life.finish(60) == 75


def refusals(log: Path) -> list[str]:
    text = log.read_text()
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("kdsr: error: ")]


FLAGS = [pytest.param([], marks=pytest.mark.slow), ["--auto_resume"]]


@pytest.mark.parametrize("flags", [[], ["--auto_resume"]])
def test_the_second_run_is_refused_with_the_first_ones_data(flags: list[str], tmp_path: Path) -> None:
    first = Life(tmp_path, [*COMMAND, *flags, *ENDLESS])
    with running(first):
        assert first.wait_until(lambda life: life.iteration > 8)
        second = Life(tmp_path, [*COMMAND, *flags, *ENDLESS])
        with running(second):
            assert second.finish(60) == 2
        (line,) = refusals(first.log)
        assert f"{tmp_path}/experiments/run is in use by another run" in line
        assert f"process {first.process.pid}, started 2" in line
        assert sorted(path.name for path in Path("experiments").iterdir()) == [".run.lock", "run"]
        stop(first)
    assert [path.name for path in Path("experiments").iterdir()] == ["run"]
    assert len(list(Path("experiments/run").glob("train_run_*.log"))) == 1
    # and it was the first's to go on with
    assert run(yaml.safe_load(Path("run.yml").read_text()), "--auto_resume") == 0


@pytest.mark.parametrize("flags", FLAGS)
def test_of_two_that_start_at_once_one_trains(flags: list[str], tmp_path: Path) -> None:
    lives = [Life(tmp_path, [*COMMAND, *flags, *ENDLESS]) for _ in range(2)]
    with running(*lives):
        sentinels = {life.process.sentinel: life for life in lives}
        (ended,) = multiprocessing.connection.wait(list(sentinels), timeout=60)
        second = sentinels.pop(ended)
        (first,) = sentinels.values()
        assert second.finish() == 2
        assert first.wait_until(lambda life: life.iteration > 4)
        stop(first)
    (line,) = refusals(first.log)
    assert f"process {first.process.pid}," in line
    assert [path.name for path in Path("experiments").iterdir()] == ["run"]


def keep_a_worker_busy() -> None:
    """From its 20th image on a worker reads for ever, and so does not notice that its main process is gone."""
    main, read, counted = os.getpid(), SeededDataset.__getitem__, itertools.count()

    def getitem(self: SeededDataset, index: Any) -> Any:
        if os.getpid() != main and next(counted) == 20:
            time.sleep(3600)
        return read(self, index)

    SeededDataset.__getitem__ = getitem  # type: ignore[method-assign]


def test_a_killed_run_with_a_living_worker_does_not_block(run_options: Options, tmp_path: Path) -> None:
    run_options["datasets"]["train"].update(num_worker_per_gpu=1, persistent_workers=True)
    write(run_options)
    first = Life(tmp_path, [*COMMAND, *ENDLESS], prepare=keep_a_worker_busy)
    with running(first):
        assert first.wait_until(lambda life: life.iteration == 10)
        (worker,) = first.workers()
        assert first.kill(workers=False) and first.workers() == [worker]
        assert Path("experiments/.run.lock").exists()
        assert run(run_options, "--auto_resume") == 0
        assert first.workers() == [worker]


def be_queued_again() -> None:
    os.environ["SLURM_RESTART_COUNT"] = "1"


def be_queued_again_in_a_hurry() -> None:
    be_queued_again()
    run_lock.PATIENCE = 1


@pytest.mark.slow
def test_a_requeued_job_waits_for_its_previous_run(tmp_path: Path) -> None:
    first = Life(tmp_path, [*COMMAND, "--auto_resume", *ENDLESS])
    with running(first):
        assert first.wait_until(lambda life: life.iteration > 8)
        hasty = Life(tmp_path, [*COMMAND, "--auto_resume", *ENDLESS], prepare=be_queued_again_in_a_hurry)
        with running(hasty):
            assert hasty.finish(60) == 2
        second = Life(tmp_path, [*COMMAND, "--auto_resume", *ENDLESS], prepare=be_queued_again)
        with running(second):
            assert second.wait_until(lambda _: "waiting up to 180 s" in first.log.read_text())
            assert second.iteration == 0
            stop(first)
            last = first.iteration
            assert second.wait_until(lambda life: life.iteration > last)
            stop(second)
    text = first.log.read_text()
    assert text.count("waiting up to 180 s") == 1 and text.count("waiting up to 1 s") == 1
    assert f", iter: {last}.\n" in text and "Resuming training from" in text


def test_when_rank_0_is_refused_all_ranks_end(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    lock = RunLock(tmp_path / "two/experiments/run")
    lock.take()
    options = yaml.safe_load(Path("run.yml").read_text())
    (tmp_path / "two/run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    try:
        assert ranks.run(tmp_path / "two", COMMAND) == [2, 2]
    finally:
        lock.release()
    for rank in range(2):
        (line,) = refusals(tmp_path / f"two/rank_{rank}.log")
        assert f"process {os.getpid()}," in line
    assert not (tmp_path / "two/experiments").exists()


@pytest.mark.parametrize("model", ["KDModel", "SRModel", pytest.param("VQGANModel", marks=pytest.mark.slow)])
@pytest.mark.parametrize("flags", FLAGS)
def test_every_model_respects_the_lock(
    model: str, flags: list[str], run_options: Options, request: pytest.FixtureRequest
) -> None:
    options = request.getfixturevalue("vqgan_options") if model == "VQGANModel" else run_options
    options["model_type"] = model
    options["train"]["total_iter"] = 4  # at which a state is saved
    lock = RunLock("experiments/run")
    lock.take()
    assert run(options, *flags) == 2
    assert list(Path("experiments").iterdir()) == [lock.file.relative_to(Path.cwd())]
    lock.release()
    for _ in range(2):  # one after the other in one process
        assert run(options, *flags) == 0
    assert len(list(Path("experiments").glob("run_archived_*"))) == (0 if flags else 1)


def test_results_are_locked_too(run_options: Options) -> None:
    assert run(run_options) == 0
    run_options["datasets"] = {"test_1": run_options["datasets"]["val"]}
    run_options["path"]["pretrain_network_g"] = "experiments/run/models/net_g_latest.pth"
    del run_options["train"], run_options["logger"]
    Path("test.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    for _ in range(3):  # within one second or two
        assert test_entry.main(["-opt", "test.yml"]) == 0
    assert len(list(Path("results").iterdir())) == 3
    before = sorted(Path("results").rglob("*"))
    lock = RunLock("results/run")
    lock.take()
    assert test_entry.main(["-opt", "test.yml"]) == 2
    lock.release()
    assert sorted(Path("results").rglob("*")) == before


def test_tensorboards_folder_is_the_runs_too(
    run_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of one name in two folders still meet there."""
    run_options["logger"]["use_tb_logger"] = True
    write(run_options)
    first = Life(tmp_path, [*COMMAND, *ENDLESS])
    with running(first):
        assert first.wait_until(lambda life: life.iteration > 2)
        assert run(run_options, "--force_yml", "path:experiments_root=elsewhere") == 2
        assert f"{tmp_path}/tb_logger/run is in use" in capsys.readouterr().err
        assert not Path("elsewhere").exists()
        stop(first)
    for _ in range(2):
        assert run(run_options) == 0
    assert len(list(Path("tb_logger").iterdir())) == 3


def test_a_folder_that_cannot_be_locked_is_trained_in_with_a_warning(
    run_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("experiments/.run.lock").mkdir(parents=True)
    assert run(run_options) == 0
    warning = "would not be detected"
    assert f"Warning: {Path.cwd()}/experiments/run cannot be locked" in capsys.readouterr().err
    (log,) = Path("experiments/run").glob("*.log")
    assert warning in log.read_text()
