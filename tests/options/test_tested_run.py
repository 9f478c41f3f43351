"""``kdsr test`` of a training's option file and of a run's folder; a test's file given to ``kdsr train``."""

from __future__ import annotations

import copy
import csv
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kdsr import test as test_entry
from kdsr import train as train_entry
from kdsr.options.files import load
from small_runs import run

Options = dict[str, Any]
RUN = Path("experiments/run")


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(dckd_options: Options) -> Options:
    """A run with teacher, extractor and history model that has ended; validated at its last step."""
    dckd_options["train"]["total_iter"] = 2
    dckd_options["val"] |= {"val_freq": 2, "teacher": True}
    dckd_options["logger"]["save_checkpoint_freq"] = 1
    assert run(dckd_options) == 0
    return dckd_options


def measured(file: Path) -> dict[tuple[str, str], float]:
    """The last student's values."""
    with file.open(newline="", encoding="utf-8") as table:
        rows = [row for row in csv.DictReader(table) if row["network"] == "student"]
    return {
        (row["set"], row["image"]): float(row["value"])
        for row in rows
        if row["iteration"] == rows[-1]["iteration"]
    }


def log_of(results: str = "results/run") -> str:
    (log,) = Path(results).glob("test_*.log")
    return log.read_text()


@pytest.mark.parametrize(
    "words",
    [["-opt", "run.yml"], ["experiments/run"], ["experiments/run/"], ["--opt", "experiments/run/run.yml"]],
    ids=["the option file", "the folder", "the folder with a slash", "the resolved file"],
)
def test_a_test_of_a_training_measures_what_its_run_did(trained: Options, words: list[str]) -> None:
    os.remove("teacher.pth")  # of no use to a test
    assert test_entry.main(words) == 0
    values = measured(Path("results/run/metrics.csv"))
    assert values and values == measured(RUN / "metrics.csv")
    log = log_of()
    assert "weights: experiments/run/models/net_g_latest.pth; also found: net_g_2.pth, net_g_1.pth" in log
    assert "describes a training: its student is tested, on its validation sets" in log
    assert "net_t" not in log and sorted(path.name for path in Path("experiments").iterdir()) == ["run"]


def test_it_is_measured_again_with_the_options_of_the_command_line(trained: Options) -> None:
    words = [
        "experiments/run",
        "name=other",
        "val.save_img=true",
        "path.pretrain_network_g=experiments/run/models/net_g_1.pth",
    ]
    assert test_entry.main(words) == 0
    assert "from experiments/run/models/net_g_1.pth" in log_of("results/other")
    assert measured(Path("results/other/metrics.csv")) != measured(RUN / "metrics.csv")
    assert len(list(Path("results/other/visualization/held_out").glob("*.png"))) == 4


def test_a_section_of_paths_that_names_no_weights_chooses_none(trained: Options) -> None:
    assert test_entry.main(["-opt", "run.yml", "path={experiments_root: experiments}"]) == 0
    assert measured(Path("results/run/metrics.csv")) == measured(RUN / "metrics.csv")


def test_a_run_that_was_moved_aside_is_tested_with_its_own_weights(trained: Options) -> None:
    before = measured(RUN / "metrics.csv")
    trained["manual_seed"] = 4
    assert run(trained) == 0  # moves the first aside
    assert test_entry.main(["experiments/run"]) == 0
    assert measured(Path("results/run/metrics.csv")) == measured(RUN / "metrics.csv") != before
    (old,) = Path("experiments").glob("run_archived_*")
    assert test_entry.main([str(old)]) == 0
    assert measured(Path("results", old.name, "metrics.csv")) == before


def test_the_newest_weights_count(run_options: Options) -> None:
    run_options["logger"] |= {"save_checkpoint_freq": 1, "save_best": {"set": "held_out", "metric": "psnr"}}
    run_options["val"]["val_freq"] = 2
    assert run(run_options) == 0
    models = RUN / "models"
    # as of a run that was made longer and did not come to its end
    os.utime(models / "net_g_latest.pth", (1, 1))
    assert test_entry.main(["experiments/run"]) == 0
    assert (
        "weights: experiments/run/models/net_g_3.pth; also found: net_g_latest.pth, net_g_best.pth"
        in log_of()
    )
    for name, then in (("latest", "net_g_3.pth"), ("3", "net_g_2.pth")):
        (models / f"net_g_{name}.pth").unlink()
        shutil.rmtree("results")
        assert test_entry.main(["run.yml"]) == 0
        assert f"weights: experiments/run/models/{then}" in log_of()


def test_the_newest_option_file_counts(trained: Options) -> None:
    changed = load(RUN / "run.yml")
    changed["val"]["metrics"] = {"mine": changed["val"]["metrics"]["psnr"]}
    (RUN / "changed.yml").write_text(yaml.safe_dump(changed))
    (RUN / "notes.yml").write_text("a: [")  # no option file
    (RUN / "test.yml").write_text(
        yaml.safe_dump({**changed, "datasets": {"val": changed["datasets"]["val"]}})
    )
    os.utime(RUN / "run.yml", (1, 1))
    assert test_entry.main(["experiments/run"]) == 0
    assert "# mine: " in log_of() and "experiments/run/changed.yml describes a training" in log_of()


def test_the_runs_weights_and_not_those_it_began_with(trained: Options) -> None:
    """``path.pretrain_network_g`` of a training is where the student starts, and so is ``param_key_g``."""
    state = torch.load(RUN / "models/net_g_latest.pth", weights_only=True)
    torch.save({"begin": {name: 0 * value for name, value in state["params"].items()}}, "begin.pth")
    expected = measured(RUN / "metrics.csv")
    trained["path"] |= {"pretrain_network_g": "begin.pth", "param_key_g": "begin", "init_from": None}
    Path("run.yml").write_text(yaml.safe_dump(trained))
    assert test_entry.main(["run.yml"]) == 0
    assert measured(Path("results/run/metrics.csv")) == expected


def test_basicsrs_own_model(run_options: Options) -> None:
    run_options["model_type"] = "SRModel"
    run_options["val"]["val_freq"] = 3
    assert run(run_options) == 0
    assert test_entry.main(["experiments/run"]) == 0
    (log,) = RUN.glob("train_*.log")
    value = log.read_text().split("# psnr: ")[1].split()[0]
    assert f"# psnr: {value}" in log_of()  # the EMA's, as in validation


@pytest.mark.parametrize("root", ["elsewhere", "~/runs"])
def test_a_run_in_another_root(run_options: Options, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.getcwd())
    run_options["path"]["experiments_root"] = root
    run_options["train"]["total_iter"] = 1
    assert run(run_options) == 0
    assert test_entry.main(["run.yml"]) == 0
    assert "weights: " in log_of() and not Path("experiments").exists()


@pytest.mark.parametrize("source", ["run.yml", "experiments/run"])
def test_a_training_without_weights_is_refused(
    run_options: Options, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (Path("run.yml"), RUN / "run.yml"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(run_options))
    run_options["datasets"].pop("val")
    assert test_entry.main([source]) == 2
    message = capsys.readouterr().err
    assert (
        f"that has saved no weights (net_g_latest.pth, net_g_N.pth) in {RUN.absolute() / 'models'}" in message
    )
    assert not Path("results").exists()


def test_a_training_without_validation_sets(run_options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    del run_options["datasets"]["val"]
    del run_options["val"]
    run_options["train"]["total_iter"] = 1
    assert run(run_options) == 0
    assert test_entry.main(["experiments/run"]) == 2
    assert "has no validation set (val, val_NAME) to test on" in capsys.readouterr().err


def test_a_folder_that_is_no_runs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert test_entry.main(["empty"]) == 2
    assert "empty: this folder has no option file of a training" in capsys.readouterr().err


def as_test_file(options: Options, key: str) -> Options:
    options = copy.deepcopy(options)
    options["datasets"] = {key: options["datasets"]["val"]}
    options.pop("train")
    return options


@pytest.mark.parametrize("key", ["test", "test_1", "val"])
def test_a_tests_file_is_not_trained(
    run_options: Options, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yml").write_text(yaml.safe_dump(as_test_file(run_options, key)))
    assert train_entry.main(["-opt", "run.yml"]) == 2
    message = "kdsr: error: run.yml describes a test (it has no datasets.train): use kdsr test -opt run.yml\n"
    assert capsys.readouterr().err == message
    assert [path.name for path in Path().iterdir()] == ["run.yml"]


def test_a_training_without_its_set_is_no_test(
    run_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    del run_options["datasets"]["train"]
    assert run(run_options) == 2
    assert capsys.readouterr().err == "kdsr: error: datasets.train: is required\n"
