"""The beginning of a log: a summary on the terminal, everything in the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.archs import build_network

from kdsr import test as test_entry
from small_runs import run

Options = dict[str, Any]
BANNER, OPTION = "/ __ )", "num_in_ch: 3"  # BasicSR's banner, and a line of the options


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def log(folder: str) -> str:
    (file,) = Path(folder).glob("*.log")
    return file.read_text(encoding="utf-8")


def without_times(text: str) -> str:
    return re.sub(r"(?m)^\d{4}-\d\d-\d\d [\d:,]+ ", "", text)


@pytest.mark.parametrize("model", ["KDModel", "SRModel"])
def test_the_summary_of_a_training(
    run_options: Options, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["model_type"] = model
    run_options["train"]["ema_decay"] = 0.999
    assert run(run_options) == 0
    shown, kept = (without_times(text) for text in (capsys.readouterr().err, log("experiments/run")))
    warning = "train.ema_decay: 0.999 is slow for 3 iterations"
    opening = shown.splitlines()
    assert opening[0].startswith(f"Warning: {warning}")
    (file,) = Path("experiments/run").glob("*.log")
    assert opening[1:5] == [
        "INFO: Training run",
        f"\tModel: {model}, 3 iterations, on the CPU",
        "\tFolder: experiments/run",
        f"\tLog, with all options: {file.name}",
    ]
    start = shown.split("Start training")[0]
    assert len(start.splitlines()) < 20 and shown.count(warning) == 1  # one screen, and nothing twice
    assert "EDSR" in start and "6,867" in start and "in held_out: 4" in start
    for text in (BANNER, OPTION, "is created", "Conv2d"):
        assert text not in shown
    assert kept.startswith("INFO: Training run\n") and kept.count(f"WARNING: {warning}") == 1
    for text in (BANNER, OPTION, "PyTorch: ", "total_iter: 3", "Model [" + model):
        assert text in kept
    assert kept.index(warning) < kept.index(BANNER) < kept.index(OPTION) < kept.index("Number of val")
    body = [text.partition("Number of val")[2].split("\n") for text in (shown, kept)]
    shared = [line for line in body[1] if line and line in body[0]]
    assert [line for line in body[0] if line] == shared  # the terminal has what the file has, in its order


@pytest.mark.parametrize("model", ["KDModel", "SRModel"])
def test_the_summary_of_a_test(run_options: Options, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_options["datasets"] = {"test_1": run_options["datasets"]["val"]}
    run_options["model_type"] = model
    del run_options["train"], run_options["logger"]
    Path("run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    assert test_entry.main(["-opt", "run.yml", "--random-weights"]) == 0
    shown, kept = (without_times(text) for text in (capsys.readouterr().err, log("results/run")))
    warning = "path.pretrain_network_g: missing; a network with random weights is tested"
    assert shown.splitlines()[:4] == [
        f"Warning: {warning}",
        "INFO: Testing run",
        f"\tModel: {model}, on the CPU",
        "\tFolder: results/run",
    ]
    assert shown.count(warning) == kept.count(f"WARNING: {warning}") == 1
    for text in (BANNER, OPTION):
        assert text in kept and text not in shown


def test_warnings_of_the_rehearsal_are_logged_once_per_run(
    dckd_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are read before and in the run, and a logger keeps its level between runs."""
    dckd_options["path"]["param_key_t"] = "params_ema"  # the file has params alone
    for _ in range(2):
        assert run(dckd_options) == 0
        shown = capsys.readouterr().err
        assert shown.count("no params_ema in it") == 1 and shown.count("net_t: EDSR") == 1


def test_each_network_is_followed_by_its_file(
    run_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    for key, width in (("network_g", 8), ("network_t", 12)):
        run_options[key] = {**run_options["network_g"], "num_feat": width}
        torch.save({"params": build_network(run_options[key]).state_dict()}, f"{key}.pth")
        run_options["path"][f"pretrain_{key}"] = f"{key}.pth"
    assert run(run_options) == 0
    lines = without_times(capsys.readouterr().err).splitlines()
    for name in ("g", "t"):
        place = next(
            index for index, line in enumerate(lines) if line.startswith(f"INFO: net_{name}: EDSR, ")
        )
        assert lines[place + 1].startswith("INFO: Loaded ") and lines[place + 1].endswith(
            f"network_{name}.pth"
        )


def test_the_lines_fit_into_80_columns(run_options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    run_options["name"] = "DCKD_SwinIR_x4_release"
    run_options["train"]["ema_decay"] = 0
    assert run(run_options) == 0
    start = capsys.readouterr().err.split("Start training")[0]
    assert [line for line in start.expandtabs().splitlines() if len(line) > 80] == []
