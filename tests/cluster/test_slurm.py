"""Training on a real Slurm cluster of two nodes: srun against torchrun, requeueing, the time limit, exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.two_nodes import NODES, TwoNodes

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "experiments" / "slurm" / "train.sbatch"
STEPS = 24
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@pytest.fixture
def folder(tmp_path: Path, dckd_options: dict[str, Any]) -> Path:
    """A working directory with an option file: DCKD of small networks, as much on two ranks as on one."""
    dckd_options["train"].update(total_iter=STEPS, step=5)
    dckd_options["datasets"]["train"].update(batch_size_per_gpu=1, dataset_enlarge_ratio=3)
    dckd_options["val"].update(val_freq=5, teacher=True)
    dckd_options["logger"].update(save_checkpoint_freq=8)
    (tmp_path / "run.yml").write_text(yaml.safe_dump(dckd_options), encoding="utf-8")
    return tmp_path


def environment(cluster: TwoNodes) -> dict[str, str]:
    return {**cluster.environment, "PYTHONPATH": str(ROOT), "KDSR_PYTHON": sys.executable}


def left(folder: Path) -> dict[str, Any]:
    """What must not depend on how the run was made: weights, optimizers, and the validations' values."""
    run = folder / "experiments" / "run"
    state = torch.load(run / "training_states" / f"{STEPS}.state", weights_only=True)
    student = torch.load(run / "models" / "net_g_latest.pth", weights_only=True)
    return {
        "networks": state["networks"], "optimizers": state["optimizers"], "student": student,
        "best": state["best_metric_results"], "metrics": (run / "metrics.csv").read_text(),
    }  # fmt: skip


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Places where two trees of tensors and plain values differ, in any bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return [found for key in a for found in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [
            found
            for n, (x, y) in enumerate(zip(a, b, strict=True))
            for found in differences(x, y, f"{place}.{n}")
        ]
    return [] if a == b else [place]


@pytest.fixture(scope="session")
def uninterrupted() -> dict[str, Any]:
    """Filled by the first test that needs it: the same run under torchrun."""
    return {}


def reference(folder: Path, kept: dict[str, Any]) -> dict[str, Any]:
    if not kept:
        words = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            ROOT / "kdsr" / "train.py",
        ]
        done = subprocess.run(
            [sys.executable, *words, "-opt", "run.yml", "--launcher", "pytorch"],
            cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        kept.update(left(folder))
        (folder / "experiments").rename(folder / "under_torchrun")
    return kept


# ---------------------------------------------------------------------------------------------- a job, from outside


class Job:
    """A job of train.sbatch in ``folder``."""

    def __init__(self, cluster: TwoNodes, folder: Path, *words: str, **more: str) -> None:
        self.cluster, self.folder, self.log = cluster, folder, folder / "job.log"
        flags, words = [w for w in words if w.startswith("--")], [w for w in words if not w.startswith("--")]
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={self.log}", *flags, str(SBATCH), *words],
            cwd=folder, env=environment(cluster) | more, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def show(self) -> dict[str, str]:
        shown = self.cluster.run("scontrol", "show", "job", "--oneliner", self.number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else "(no log)"

    def wait(self, reached: Any, seconds: float = 120) -> dict[str, str]:
        end = time.monotonic() + seconds
        while not reached(shown := self.show()):
            over = shown["JobState"] in ENDED
            assert not over and time.monotonic() < end, f"waited {seconds} s; {shown}\n{self.text()}"
            time.sleep(0.2)
        return shown

    def wait_end(self) -> dict[str, str]:
        return self.wait(lambda shown: shown["JobState"] in ENDED)

    def start_again(self) -> None:
        """A requeued job waits for two minutes, unless its start time is updated.

        Not less than seconds: nodes refuse a job that comes again in the second in which it was ended.
        """
        self.wait(lambda shown: shown["JobState"] == "PENDING" and self.cluster.states() == ["idle", "idle"])
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+2seconds")

    def iteration(self) -> int:
        """The last one that was logged."""
        found = re.findall(r"iter:\s*(\d+), lr", self.text())
        return int(found[-1]) if found else 0

    def ranks(self) -> list[int]:
        """Process ids of the training."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                if (
                    b"kdsr.train" in words
                    and b"srun" not in words[0]
                    and os.readlink(process / "cwd") == str(self.folder)
                ):
                    found.append(int(process.name))
            except OSError:
                continue  # gone in the meantime
        return found

    def hold(self, iteration: int) -> list[int]:
        """Stops the ranks' processes once ``iteration`` is logged, so that what follows comes in mid-run."""
        self.wait(lambda _: self.iteration() >= iteration)
        pids = self.ranks()
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        assert self.iteration() < STEPS
        return pids


# ------------------------------------------------------------------------------------------------------------- tests


def test_srun_ends_in_the_bits_of_torchrun(
    cluster: TwoNodes, folder: Path, uninterrupted: dict[str, Any]
) -> None:
    expected = reference(folder, uninterrupted)
    words = [
        "-N2",
        "-n2",
        sys.executable,
        str(ROOT / "kdsr" / "train.py"),
        "-opt",
        "run.yml",
        "--launcher",
        "slurm",
    ]
    done = subprocess.run(
        ["srun", *words], cwd=folder, env=environment(cluster), capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert differences(left(folder), expected) == []
    images = [row.split(",")[3] for row in expected["metrics"].splitlines()[1:]]
    assert set(images) == {"astronaut", "cat", "coffee", "rocket"}  # of both ranks


def test_a_requeued_run_ends_in_the_same_bits(
    cluster: TwoNodes, folder: Path, uninterrupted: dict[str, Any]
) -> None:
    expected = reference(folder, uninterrupted)
    job = Job(cluster, folder, "--nodes=2", "--ntasks-per-node=1", "run.yml")
    job.hold(4)
    cluster.run("scontrol", "requeue", job.number)
    job.start_again()
    shown = job.wait_end()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), job.text()
    assert "SIGTERM: stopped after iteration" in job.text() and "Resuming training from" in job.text()
    assert differences(left(folder), expected) == []


def has_come(pid: int, number: signal.Signals) -> bool:
    """Whether a held process has been sent a signal; some versions of Slurm continue it as well, and it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)", status, flags=re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_a_time_limit_shorter_than_the_run(
    cluster: TwoNodes, folder: Path, uninterrupted: dict[str, Any]
) -> None:
    """Slurm's own signal before the limit of a minute; the job puts itself back.

    Slurm looks at the limits every 30 seconds, and sends the signal up to 30 seconds early.
    """
    expected = reference(folder, uninterrupted)
    job = Job(cluster, folder, "--nodes=2", "--ntasks-per-node=1", "--time=1", "--signal=USR1@5", "run.yml")
    pids = job.hold(4)
    job.wait(lambda _: all(has_come(pid, signal.SIGUSR1) for pid in pids))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    job.start_again()
    shown = job.wait_end()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), job.text()
    assert "SIGUSR1: stopped after iteration" in job.text() and "train.sbatch: " in job.text()
    assert differences(left(folder), expected) == []


@pytest.mark.parametrize(
    ("code", "state"), [(0, "COMPLETED"), (1, "FAILED"), (2, "FAILED"), (128 + signal.SIGUSR1, "FAILED")]
)
def test_what_failed_is_not_queued_again(cluster: TwoNodes, tmp_path: Path, code: int, state: str) -> None:
    """With a Python that says how it was called and exits."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
    python.chmod(0o755)
    job = Job(cluster, tmp_path, "run.yml", "-x", KDSR_PYTHON=str(python))
    shown = job.wait_end()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == (state, f"{code}:0", "0")
    assert "-m kdsr.train -opt run.yml --auto_resume --launcher slurm -x" in job.text().splitlines()


STOPS = """#!/bin/sh
trap 'exit 75' TERM USR1
echo "life ${SLURM_RESTART_COUNT:-0}"
while :; do sleep 0.1; done
"""


@pytest.fixture
def stopping_job(cluster: TwoNodes, tmp_path: Path) -> Iterator[Job]:
    """A running job of two ranks which, instead of training, wait for a signal to stop."""
    python = tmp_path / "python"
    python.write_text(STOPS)
    python.chmod(0o755)
    job = Job(cluster, tmp_path, "--nodes=2", "--ntasks-per-node=1", "run.yml", KDSR_PYTHON=str(python))
    job.wait(lambda _: job.text().count("life 0") == 2)
    yield job
    cluster.run("scancel", job.number, check=False)
    job.wait_end()


def test_a_cancelled_job_stays_cancelled(cluster: TwoNodes, stopping_job: Job) -> None:
    cluster.run("scancel", stopping_job.number)
    shown = stopping_job.wait_end()
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")


def test_a_signal_from_outside_saves(cluster: TwoNodes, stopping_job: Job) -> None:
    cluster.run("scancel", "--signal=USR1", stopping_job.number)
    stopping_job.start_again()
    shown = stopping_job.wait(lambda _: stopping_job.text().count("life 1") == 2)
    assert (shown["JobState"], shown["Restarts"]) == ("RUNNING", "1")


def test_pre_emption_with_a_grace_time(cluster: TwoNodes, stopping_job: Job) -> None:
    cluster.run("srun", "--partition=urgent", "-N2", "-n2", "true")
    stopping_job.start_again()
    shown = stopping_job.wait(lambda _: stopping_job.text().count("life 1") == 2)
    assert (shown["JobState"], shown["Restarts"]) == ("RUNNING", "1")


def test_a_node_that_dies(cluster: TwoNodes, stopping_job: Job) -> None:
    cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    shown = stopping_job.wait(lambda shown: shown["Restarts"] == "1")
    assert shown["JobState"] in ("PENDING", "COMPLETING")
    for _ in range(60):  # refused while the job is completing
        cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME", check=False)
        if cluster.states() == ["idle", "idle"]:
            return
        time.sleep(0.5)
    pytest.fail(f"the node does not come back: {cluster.states()}")
