"""The folder of a run: valid names, and only runs' folders are renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdsr import test as test_entry
from kdsr.options.signatures import folder_name_problems
from small_runs import run

Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.text() | st.text("./\\ ~a\n", max_size=6))
@example("..")
@example("../x")
@example("ü" * 150)
def test_a_name_is_a_folder_of_its_own_below_the_root(name: str) -> None:
    """A valid name makes one folder, and its longest file names are valid."""
    if folder_name_problems(name):
        return
    assert os.path.normpath(os.path.join("experiments", name)) == f"experiments/{name}"
    assert os.path.dirname(f"experiments/{name}") == "experiments"
    assert name.isprintable() and name == name.strip()
    assert len(f"train_{name}_20260101_000000.log".encode()) < 255


@pytest.mark.parametrize(
    "name", ["run", "DCKD_SwinIR_x4", "a b", "ü", "1e5", "...", "-x", "x_archived_20260101_000000"]
)
def test_valid_names(name: str) -> None:
    assert folder_name_problems(name) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("..", "not the name of a new folder"),
        (".", "not the name of a new folder"),
        ("", "is required"),
        ("  ", "has only spaces"),
        ("../other", "not a path"),
        ("a/../..", "not a path"),
        ("a/b", "not a path"),
        ("/tmp/x", "not a path"),
        ("run ", "spaces at its ends"),
        ("a\nb", "characters that cannot be printed"),
        ("a\0b", "characters that cannot be printed"),
        ("x" * 201, "longer than 200 bytes"),
    ],
)
def test_invalid_names(
    run_options: Options, name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["name"] = name
    Path("experiments/kept").mkdir(parents=True)
    before = sorted(Path("..").rglob("*"))
    assert run(run_options) == 2
    message = capsys.readouterr().err
    assert message.startswith("kdsr: error: name: ") and reason in message and message.count("\n") == 1
    assert sorted(path for path in Path("..").rglob("*") if path.name != "run.yml") == before


@pytest.mark.parametrize("entry", ["EDSR_x4.pth", "EDSR_x4.yml", "EDSR_x4.log", "sub/x.txt", None])
@pytest.mark.parametrize("training", [True, False])
def test_a_folder_that_is_not_a_runs_is_kept(
    run_options: Options, entry: str | None, training: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """experiments/pretrained_models, datasets with ``path.experiments_root: .``, and a file of that name."""
    root = "experiments_root" if training else "results_root"
    run_options["name"], run_options["path"] = "precious", {root: "."}
    target = Path("precious")
    if entry is None:
        target.touch()
    else:
        (target / entry).parent.mkdir(parents=True)
        (target / entry).touch()
    if training:
        code = run(run_options)
    else:
        run_options["datasets"] = {"val": run_options["datasets"]["val"]}
        Path("run.yml").write_text(yaml.safe_dump(run_options))
        code = test_entry.main(["run.yml", "--random-weights"])
    assert code == 2
    assert f"name: {target.absolute()} exists and is not the folder of a run" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["precious", "run.yml"]


def test_a_runs_folder_and_an_empty_one_are_renamed(run_options: Options) -> None:
    run_options["train"]["total_iter"] = 1
    Path("experiments/run").mkdir(parents=True)
    for before in (1, 2):
        assert run(run_options) == 0
        assert len(list(Path("experiments").glob("run_archived_*"))) == before
        for archived in Path("experiments").glob("run_archived_2*"):
            archived.rename(archived.with_name(f"run_archived_{before}"))
    assert test_entry.main(["experiments/run"]) == 0
    assert test_entry.main(["experiments/run"]) == 0
    assert len(list(Path("results").glob("run_archived_*"))) == 1


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", "a/../../../b"])
def test_restored_images_stay_in_the_folder_of_the_test(
    run_options: Options, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["datasets"] = {"val": {**run_options["datasets"]["val"], "name": name}}
    run_options["val"]["suffix"] = "../x"
    Path("run.yml").write_text(yaml.safe_dump(run_options))
    assert test_entry.main(["run.yml"]) == 2
    problems = capsys.readouterr().err.splitlines()
    for place, value in (("datasets.val.name", name), ("val.suffix", "../x")):
        (problem,) = (line for line in problems if place in line)
        assert f"{place}: {value!r} becomes part of the name of a file" in problem
