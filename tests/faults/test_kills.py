"""SIGKILL at any moment, the same command again: the run ends in the bits of one that was never stopped."""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from faults import lives
from faults.conftest import write_options

Options = dict[str, Any]
COMMAND = ["-opt", "run.yml", "--auto_resume"]
KILLS = 20
TOTAL = 44
# what the kills aim at; the last one waits for the end of the run
AIMS = [lives.START] * 3 + [lives.STEP] * 7 + [lives.SAVE] * 6 + [lives.VALIDATION] * 3


def prepare(options: Options) -> Options:
    """Frequent saves and validations that do not fall together, epochs that end between them, a loader process."""
    options["datasets"]["train"].update(num_worker_per_gpu=1, dataset_enlarge_ratio=3.5)  # 7 steps
    options["train"]["total_iter"] = TOTAL
    options["train"]["scheduler"]["milestones"] = [9, 30]
    options["logger"].update(save_checkpoint_freq=2, save_best={"set": "held_out", "metric": "psnr"})
    options["val"]["val_freq"] = 3
    return options


@dataclass(frozen=True)
class Hit:
    """Where a kill hit, and whether it left a file half written or weights without the state that names them."""

    phase: int
    iteration: int
    half_written: bool
    weights_alone: bool


def look_at(run: Path, life: lives.Life, left_before: set[str]) -> Hit:
    weights = max((int(path.stem[6:]) for path in run.glob("models/net_g_[0-9]*.pth")), default=0)
    return Hit(
        life.phase, life.iteration, bool(left_in_writing(run) - left_before), weights > lives.newest(run)
    )


def kill_20_times(folder: Path, seed: int) -> list[Hit]:
    """Starts, kills and starts the run in ``folder``; gives where each kill hit."""
    rng = random.Random(seed)
    aims = AIMS.copy()
    rng.shuffle(aims)
    aims.append(lives.END)
    assert len(aims) == KILLS
    # moments over the whole run: each life gets further than the one before, or as far
    moments = sorted(rng.randint(1, TOTAL) for _ in aims)
    hits: list[Hit] = []
    run = folder / "experiments/run"
    for aim, moment in zip(aims, moments, strict=True):
        left = left_in_writing(run)
        life = lives.Life(folder, COMMAND)
        if aim == lives.START:
            time.sleep(rng.uniform(0, 0.5))
        elif aim == lives.END:
            life.wait_until(lambda life: life.iteration == TOTAL and life.phase != lives.STEP)
            time.sleep(rng.uniform(0, 0.02))
        elif aim == lives.STEP:
            life.wait_until(lambda life, moment=moment: life.iteration >= moment)
            time.sleep(rng.uniform(0, 0.12))
        else:
            life.wait_until(
                lambda life, aim=aim, moment=moment: life.iteration >= moment and life.phase == aim
            )
            time.sleep(rng.uniform(0, 0.008))
        if life.kill():
            hits.append(look_at(run, life, left))
    return hits


def left_in_writing(run: Path) -> set[str]:
    return {path.name for path in run.rglob(".*.tmp")}


@pytest.mark.parametrize("method", ["dckd", "logits", "vqgan"])
def test_20_kills_change_no_bit(method: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    options = prepare(request.getfixturevalue(f"{method}_options"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_options(folder, options)
    assert lives.train(whole, COMMAND) == 0
    hits = kill_20_times(killed, seed=20)
    assert len(hits) == KILLS, "kills that came too late"
    assert lives.train(killed, COMMAND) == 0
    counted = Counter(lives.PHASES[hit.phase] for hit in hits)
    counted["with a file half written"] = sum(hit.half_written for hit in hits)
    counted["with weights whose state was not written"] = sum(hit.weights_alone for hit in hits)
    print(f"\n{method}: " + ", ".join(f"{number} {where}" for where, number in counted.items()))
    assert lives.differences(whole / "experiments/run", killed / "experiments/run") == []
    assert (killed / "experiments/run/models/net_g_best.pth").exists()
    assert left_in_writing(killed) == set()
    assert [path.name for path in (killed / "experiments").iterdir()] == ["run"]  # nothing was begun anew


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_loader_processes_end_when_their_main_process_is_killed(run_options: Options, tmp_path: Path) -> None:
    options = prepare(run_options)
    options["datasets"]["train"]["num_worker_per_gpu"] = 3
    options["train"]["total_iter"] = 10**6
    write_options(tmp_path, options)
    life = lives.Life(tmp_path, COMMAND)
    assert life.wait_until(lambda life: life.iteration > 2 and len(life.workers()) == 3)
    assert life.kill(workers=False)
    deadline = time.monotonic() + 30
    while life.workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    left = life.workers()
    life.kill()
    assert left == []


def start_two(folder: Path) -> list[lives.Life]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*COMMAND, "--launcher", "pytorch"]
    return [lives.Life(folder, command, rank=(rank, 2, port)) for rank in (0, 1)]


def test_8_kills_of_one_of_two_processes_change_no_bit(run_options: Options, tmp_path: Path) -> None:
    """Over gloo, as under torchrun but without its own restarts: the process that is left ends with a clear line."""
    options = prepare(run_options)
    options["datasets"]["train"]["batch_size_per_gpu"] = 1
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_options(folder, options)
    assert [life.finish() for life in start_two(whole)] == [0, 0]

    rng = random.Random(8)
    for kill, moment in enumerate(sorted(rng.sample(range(1, TOTAL), 8))):
        ranks = start_two(killed)
        victim, other = ranks if kill % 2 else reversed(ranks)
        assert victim.wait_until(lambda life, moment=moment: life.iteration >= moment)
        time.sleep(rng.uniform(0, 0.05))
        assert victim.kill()
        assert other.finish() == 1
        log = other.log.read_text()
        assert "Traceback" not in log
        assert log.splitlines()[-1].startswith("kdsr: error: rank "), log[-500:]
        other.log.unlink()
    assert [life.finish() for life in start_two(killed)] == [0, 0]
    assert lives.differences(whole / "experiments/run", killed / "experiments/run") == []
    assert left_in_writing(killed) == set()
