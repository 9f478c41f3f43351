"""States that were cut short or changed on the disk: ``--auto_resume`` says which, and goes on from an older one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from faults import lives
from faults.conftest import write_options
from kdsr.pipeline.resume import newest_state

COMMAND = ["-opt", "run.yml", "--auto_resume"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Folder that gets one whole run by the first test that needs it."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def run(finished: Path, logits_options: dict[str, Any]) -> Path:
    """The folder of a finished run of six iterations with the states 2, 4 and 6."""
    folder = finished / "experiments/run"
    if not folder.exists():
        logits_options["train"]["total_iter"] = 6
        logits_options["logger"]["save_checkpoint_freq"] = 2
        logits_options["val"]["val_freq"] = 3
        for key, file in logits_options["path"].items():
            if key.startswith("pretrain_network"):
                logits_options["path"][key] = shutil.copy(file, finished)
        write_options(finished, logits_options)
        assert lives.train(finished, COMMAND) == 0
    return folder


def damaged(run: Path, folder: Path, changed: dict[int, bytes]) -> Path:
    """A copy of the run in ``folder``, with other bytes in the states of some iterations."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    for iteration, content in changed.items():
        (folder / f"training_states/{iteration}.state").write_bytes(content)
    return folder


def look(folder: Path) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
    return newest_state(folder / "training_states", folder / "models")


def lengths(size: int, count: int) -> list[int]:
    """Nothing, one byte, all but one, and random lengths between."""
    return [0, 1, size - 1, *random.Random(count).sample(range(2, size - 1), count - 3)]


def test_a_state_cut_short_at_50_lengths_is_skipped(run: Path, tmp_path: Path) -> None:
    folder = damaged(run, tmp_path / "run", {})
    newest = folder / "training_states/6.state"
    content = newest.read_bytes()
    for length in lengths(len(content), 50):
        newest.write_bytes(content[:length])
        state, file, skipped = look(folder)
        assert state is not None and state["iter"] == 4, length
        assert file == folder / "training_states/4.state"
        (line,) = skipped
        assert str(newest) in line, length


def test_50_flipped_bits_are_found_or_do_no_harm(run: Path, tmp_path: Path) -> None:
    folder = damaged(run, tmp_path / "run", {})
    newest = folder / "training_states/6.state"
    content = newest.read_bytes()
    whole, _, _ = look(folder)
    assert whole is not None and whole["iter"] == 6
    rng = random.Random(50)
    found = 0
    for _ in range(50):
        flipped = bytearray(content)
        place = rng.randrange(len(content))
        flipped[place] ^= 1 << rng.randrange(8)
        newest.write_bytes(flipped)
        state, _, skipped = look(folder)
        assert state is not None
        if skipped:
            assert state["iter"] == 4 and str(newest) in skipped[0]
            found += 1
        else:  # between the tensors a zip file has bytes that nobody reads
            assert lives.unlike(whole, state) == [], f"bit of byte {place}"
    assert found > 30


def test_where_no_state_is_whole_there_is_none(run: Path, tmp_path: Path) -> None:
    folder = damaged(run, tmp_path / "run", {2: b"", 4: b"PK\x03\x04", 6: b"\x80\x02}q\x00."})
    state, file, skipped = look(folder)
    assert state is None and file is None
    assert [f"{iteration}.state" in line for iteration, line in zip((6, 4, 2), skipped, strict=True)] == [
        True
    ] * 3


@pytest.mark.parametrize("whole", [4, 2])
def test_a_run_goes_on_from_the_older_state_to_the_same_bits(run: Path, tmp_path: Path, whole: int) -> None:
    content = (run / "training_states/6.state").read_bytes()
    cut = {iteration: content[: 1000 * iteration] for iteration in (4, 6) if iteration > whole}
    folder = damaged(run, tmp_path / "experiments/run", cut)
    shutil.copy(run.parents[1] / "run.yml", tmp_path)
    assert lives.train(tmp_path, COMMAND) == 0
    log = (tmp_path / "life.log").read_text()
    for iteration in cut:
        assert f"{folder}/training_states/{iteration}.state" in log
    assert lives.differences(run, folder) == []


def test_a_run_without_a_whole_state_begins_anew(run: Path, tmp_path: Path) -> None:
    folder = damaged(run, tmp_path / "experiments/run", dict.fromkeys((2, 4, 6), b"PK\x03\x04"))
    shutil.copy(run.parents[1] / "run.yml", tmp_path)
    assert lives.train(tmp_path, COMMAND) == 0
    assert lives.differences(run, folder) == []
    assert len(list(folder.parent.glob("run_archived_*"))) == 1  # the damaged one is put aside, not removed
