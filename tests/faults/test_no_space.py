"""Disks that are full, folders that cannot be written or are gone: a clear line, the last good state, the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import lives
from faults.conftest import write_options
from kdsr.pipeline.resume import newest_state

COMMAND = ["-opt", "run.yml", "--auto_resume"]
MOUNTS = os.name == "posix" and os.geteuid() == 0 and shutil.which("mount") is not None
Disk = Callable[..., Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Makes ``folder/experiments`` (or another name) a disk of its own, in memory; gives that folder."""
    mounted: list[Path] = []

    def mount(folder: Path, options: str = "size=8m", name: str = "experiments") -> Path:
        experiments = folder / name
        experiments.mkdir(parents=True, exist_ok=True)
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(experiments)], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
        mounted.append(experiments)
        return experiments

    if not MOUNTS:
        pytest.skip("NOT TESTED: a full disk; only root can mount a small one (run the tests as root for it)")
    try:
        yield mount
    finally:
        for experiments in mounted:
            subprocess.run(["umount", "-l", str(experiments)], check=True)


def fill(disk: Path, room: int) -> Path:
    """Fills a disk but for ``room`` bytes."""
    free = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - room))
    return ballast


def errors(folder: Path) -> list[str]:
    """The error lines of the last life in a folder; nothing else may look like an error there."""
    log = (folder / "life.log").read_text()
    assert "Traceback" not in log, log
    found = [line for line in log.splitlines() if line.startswith("kdsr: error: ")]
    (folder / "life.log").unlink()
    return found


def prepare(options: dict[str, Any]) -> dict[str, Any]:
    options["train"]["total_iter"] = 8
    options["logger"]["save_checkpoint_freq"] = 2
    options["val"].update(val_freq=3, save_img=True)
    return options


@pytest.fixture
def whole(logits_options: dict[str, Any], tmp_path: Path) -> Path:
    """A run with room enough; its options lie in ``starved`` too."""
    prepare(logits_options)
    write_options(tmp_path / "starved", logits_options)
    write_options(tmp_path / "whole", logits_options)
    assert lives.train(tmp_path / "whole", COMMAND) == 0
    return tmp_path / "whole/experiments/run"


# from "not even the options" through the log, the weights, a state, restored images and metrics.csv
ROOMS = [0, 4096, 12288, 40960, 98304, 180224, 270336, 303104, 327680, 401408]


def test_a_full_disk_stops_the_run_and_loses_nothing(whole: Path, disk: Disk, tmp_path: Path) -> None:
    named = set()
    for room in ROOMS:
        folder = tmp_path / f"starved_{room}"
        shutil.copytree(tmp_path / "starved", folder)
        run = disk(folder) / "run"
        ballast = fill(run.parent, room)
        assert lives.train(folder, COMMAND) == 1, room
        (line,) = errors(folder)
        assert str(run) in line and "No space left on device" in line
        named.add(Path(line.removeprefix("kdsr: error: ").partition(": ")[0]).name)
        assert list(run.rglob(".*.tmp")) == []
        states = sorted(int(path.stem) for path in run.glob("training_states/*.state"))
        state, _, skipped = newest_state(run / "training_states", run / "models")
        assert skipped == [] and (state["iter"] if state else None) == (states[-1] if states else None)
        for weights in run.glob("models/*.pth"):
            torch.load(weights, weights_only=True)

        ballast.unlink()
        assert lives.train(folder, COMMAND) == 0
        assert errors(folder) == []
        assert lives.differences(whole, run) == [], room
    print(f"\nfiles at which the disk was full: {', '.join(sorted(named))}")
    assert len(named) >= 4  # that many kinds of writing were hit


def test_tensorboards_disk_is_full(logits_options: dict[str, Any], disk: Disk, tmp_path: Path) -> None:
    """Its events are written by a thread of their own, after a while."""
    prepare(logits_options)["logger"].update(use_tb_logger=True)
    logits_options["train"]["total_iter"] = 10**6
    for room in (0, 8192):
        folder = tmp_path / f"room_{room}"
        write_options(folder, logits_options)
        fill(disk(folder, "size=64k", "tb_logger"), room)
        assert lives.train(folder, COMMAND) == 1
        (line,) = errors(folder)
        assert (
            f"{folder}/tb_logger/run: TensorBoard's events cannot be written (No space left on device)"
            in line
        )


def test_a_disk_without_free_names(whole: Path, disk: Disk, tmp_path: Path) -> None:
    """Inodes can run out before bytes do."""
    run = disk(tmp_path / "starved", "size=8m,nr_inodes=10") / "run"
    assert lives.train(tmp_path / "starved", COMMAND) == 1
    (line,) = errors(tmp_path / "starved")
    assert str(run) in line and "cannot be written" in line
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(run.parent)], check=True)
    assert lives.train(tmp_path / "starved", COMMAND) == 0
    assert lives.differences(whole, run) == []


def test_a_folder_that_cannot_be_written(whole: Path, disk: Disk, tmp_path: Path) -> None:
    starved = tmp_path / "starved"
    run = disk(starved, "ro,size=8m") / "run"
    assert lives.train(starved, COMMAND) == 1
    (line,) = errors(starved)
    assert str(run) in line and "Read-only file system" in line
    # and one that has become so since the run began
    subprocess.run(["mount", "-o", "remount,rw", str(run.parent)], check=True)
    assert lives.train(starved, [*COMMAND, "--force_yml", "train:total_iter=4"]) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(run.parent)], check=True)
    errors(starved)
    assert lives.train(starved, COMMAND) == 1
    (line,) = errors(starved)
    assert str(run) in line and "Read-only file system" in line
    subprocess.run(["mount", "-o", "remount,rw", str(run.parent)], check=True)
    assert lives.train(starved, COMMAND) == 0
    assert lives.unlike(*(last_networks(folder) for folder in (whole, run))) == []


def last_networks(run: Path) -> dict[str, Any]:
    return torch.load(run / f"training_states/{lives.newest(run)}.state", weights_only=True)["networks"]


def test_a_folder_that_is_deleted_in_mid_run(
    logits_options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """What the run still has it writes into a new folder: the end is all there, the past is not."""
    folder = tmp_path / "starved"
    run = folder / "experiments/run"
    life = lives.Life(folder, COMMAND)
    assert life.wait_until(lambda life: life.iteration == 3 and life.phase == lives.STEP)
    with life.held():
        assert (
            life.phase == lives.STEP
        )  # not in the midst of a file: that would be an error, as on a full disk
        shutil.rmtree(run)
    assert life.finish() == 0
    assert errors(folder) == []
    assert lives.unlike(*(last_networks(folder) for folder in (whole, run))) == []
    assert "\n8,student," in (run / "metrics.csv").read_text()
