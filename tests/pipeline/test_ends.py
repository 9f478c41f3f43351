"""However a run ends, its process exits with the right code, without leaving loader processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.lives import Life
from kdsr.pipeline.session import Session
from small_runs import after_steps

Options = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 90  # seconds; a run takes two or three

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


def in_step_3(do: Callable[[], object]) -> None:
    after_steps(lambda model, current_iter: do() and None if current_iter == 3 else None)


def send(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


def interrupt_twice() -> None:
    in_step_3(lambda: [send("SIGINT"), send("SIGINT")])


def fail_in_a_step() -> None:
    in_step_3(lambda: 1 // 0)


def stop_before_the_first_iteration() -> None:
    original = Session.build_model

    def build_model(self: Session, opt: Options) -> Any:
        send("SIGTERM")
        return original(self, opt)

    Session.build_model = build_model  # type: ignore[method-assign]


def fail_to_shut_down() -> None:
    """Like Ctrl-C during it."""
    from torch.utils.data import dataloader

    def shut_down(self: Any) -> None:
        raise KeyboardInterrupt

    dataloader._MultiProcessingDataLoaderIter._shutdown_workers = shut_down


def to_main(name: str) -> Callable[[Life], None]:
    def act(life: Life) -> None:
        assert life.wait_until(lambda life: life.iteration >= 3)
        os.kill(life.process.pid or 0, signal.Signals[name])

    return act


def to_the_group(name: str) -> Callable[[Life], None]:
    def act(life: Life) -> None:
        assert life.wait_until(lambda life: life.iteration >= 3)
        os.killpg(life.process.pid or 0, signal.Signals[name])

    return act


def kill_a_worker(life: Life) -> None:
    assert life.wait_until(lambda life: life.iteration >= 3)
    os.kill(life.workers()[0], signal.SIGKILL)


def stop_a_worker_then_the_run(life: Life) -> None:
    """A worker that does not respond, as if waiting for a file server, and a run that waits for its batch."""
    assert life.wait_until(lambda life: life.iteration >= 3)
    os.kill(life.workers()[0], signal.SIGSTOP)
    made = -1
    while life.iteration != made:  # until the batches that were loaded before are used up
        made = life.iteration
        time.sleep(1)
    os.kill(life.process.pid or 0, signal.SIGINT)
    assert life.wait_until(lambda life: "SIGINT: finishing" in life.log.read_text())
    os.kill(life.process.pid or 0, signal.SIGINT)


@dataclass(frozen=True)
class End:
    """How a run ends.

    Attributes:
        code: The exit code.
        act: Done to the running process; None: the run has 6 iterations.
        prepare: Done in it before the training.
        damaged: Whether an image cannot be read.
        needs_workers: Whether it takes a loader process.
    """

    code: int
    act: Callable[[Life], None] | None = None
    prepare: Callable[[], None] | None = None
    damaged: bool = False
    needs_workers: bool = False


ENDS = {
    "last iteration": End(0),
    "SIGTERM": End(75, to_main("SIGTERM")),
    "SIGTERM to the group": End(75, to_the_group("SIGTERM")),
    "SIGINT": End(75, to_main("SIGINT")),
    "SIGINT to the group": End(75, to_the_group("SIGINT")),
    "SIGUSR1": End(75, to_main("SIGUSR1")),
    "SIGUSR1 to the group": End(75, to_the_group("SIGUSR1")),
    "two SIGINT": End(130, prepare=interrupt_twice),
    "error in a step": End(1, prepare=fail_in_a_step),
    "image that cannot be read": End(1, damaged=True),
    "before the first iteration": End(143, prepare=stop_before_the_first_iteration),
    "worker that is killed": End(1, kill_a_worker, needs_workers=True),
    "worker that does not answer": End(130, stop_a_worker_then_the_run, needs_workers=True),
    "interrupted while it shuts down": End(130, prepare=fail_to_shut_down, needs_workers=True),
}
# torch waits 5 seconds for a worker that does not answer; the others are like one that is quick
SLOW = {"worker that does not answer", "SIGINT", "SIGINT to the group", "SIGUSR1"}


def cases() -> list[Any]:
    found = []
    for (workers, persistent), (name, end) in itertools.product(
        itertools.product((0, 1, 2), (False, True)), ENDS.items()
    ):
        if end.needs_workers and workers == 0:
            continue
        quick = (workers, persistent) == (2, True) and name not in SLOW
        marks = () if quick else (pytest.mark.slow,)
        label = f"{workers}{' persistent' if persistent else ''}-{name}"
        found.append(pytest.param(workers, persistent, end, id=label, marks=marks))
    return found


@pytest.mark.parametrize(("workers", "persistent", "end"), cases())
def test_a_run_ends_and_leaves_no_process(
    workers: int, persistent: bool, end: End, run_options: Options, photos: Path, tmp_path: Path
) -> None:
    train = run_options["datasets"]["train"]
    train.update(num_worker_per_gpu=workers, persistent_workers=persistent, dataset_enlarge_ratio=5)
    run_options["train"]["total_iter"] = 10**6 if end.act else 6
    if end.damaged:
        damage(train, photos, tmp_path)
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    life = Life(tmp_path, ["-opt", "run.yml"], prepare=end.prepare)
    try:
        if end.act:
            end.act(life)
        life.process.join(LIMIT)
        ended, left = not life.process.is_alive(), life.workers()
    finally:
        life.kill()
    log = life.log.read_text()
    assert ended, log[-2000:]
    assert (life.process.exitcode, left) == (end.code, []), log[-2000:]


def damage(train: Options, photos: Path, folder: Path) -> None:
    """One image has a valid header, so that the damage shows only when it is read."""
    for key in ("GT", "LR_x4"):
        (folder / key).mkdir()
        for file in (photos / key).iterdir():
            (folder / key / file.name).write_bytes(file.read_bytes())
    image = folder / "LR_x4" / "cat.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:80] + bytes(len(whole) - 80))
    train.update(dataroot_gt=str(folder / "GT"), dataroot_lq=str(folder / "LR_x4"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_ends_too(ranks: int, run_options: Options, tmp_path: Path) -> None:
    """A separate process with Python's own exit; ranks exit differently."""
    run_options["datasets"]["train"].update(
        num_worker_per_gpu=1, persistent_workers=True, dataset_enlarge_ratio=5
    )
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    command = ["-m", "kdsr.cli", "train", "-opt", "run.yml"]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*torchrun, str(REPOSITORY / "kdsr" / "train.py"), *command[3:], "--launcher", "pytorch"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for flags, code in (([], 0), (["--force_yml", "train:total_iter=1000000"], 75)):
        process = subprocess.Popen(
            [sys.executable, *command, *flags], cwd=tmp_path, env=environment, start_new_session=True,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            if code == 75:
                assert process.stderr
                next(line for line in process.stderr if "iter:       3" in line)
                process.terminate()
            _, message = process.communicate(timeout=LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == (code if ranks == 1 or code == 0 else 1), message  # torchrun's own is 1
        assert code == 0 or "stopped after iteration" in message


@pytest.mark.parametrize("key", ["persistent_workers", "prefetch_mode"])
def test_a_validation_set_with_a_training_sets_options(
    key: str, run_options: Options, photos: Path, tmp_path: Path
) -> None:
    """Without loader processes: an image would kill BasicSR's prefetch thread (``cpu``), and the run would hang."""
    run_options["datasets"]["val"][key] = {"persistent_workers": True, "prefetch_mode": "cpu"}[key]
    if key == "prefetch_mode":
        run_options["model_type"] = "SRModel"  # which validates through the loader; ours read the set itself
        damage(run_options["datasets"]["val"], photos, tmp_path)
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    life = Life(tmp_path, ["-opt", "run.yml"])
    try:
        life.process.join(LIMIT)
        ended = not life.process.is_alive()
    finally:
        life.kill()
    log = life.log.read_text()
    assert ended, log[-2000:]
    assert life.process.exitcode == (1 if key == "prefetch_mode" else 0), log[-2000:]
    assert "Traceback" not in log
