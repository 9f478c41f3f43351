"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]


def call(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def option_file(run_options: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "small.yml"
    path.write_text(yaml.safe_dump(run_options), encoding="utf-8")
    return path


def values(metrics: Path) -> dict[str, float]:
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == "student"]
    assert len({row["image"] for row in rows}) == len(rows)
    return {row["image"]: float(row["value"]) for row in rows}


def values_of_a_test(option_file: Path) -> dict[str, float]:
    """What ``kdsr/test.py`` measures of the student that a run of these options has left."""
    options = yaml.safe_load(option_file.read_text())
    options["datasets"] = {"test_1": options["datasets"]["val"]}
    options["path"]["pretrain_network_g"] = "experiments/run/models/net_g_latest.pth"
    del options["train"], options["logger"]
    folder = option_file.parent
    (folder / "test.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    done = call(sys.executable, str(REPOSITORY / "kdsr" / "test.py"), "-opt", "test.yml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return values(folder / "results/run/metrics.csv")


def test_the_script_runs_from_anywhere_without_an_installation(option_file: Path, tmp_path: Path) -> None:
    """-S leaves out what an editable installation puts on the path; the libraries are named by hand."""
    script = REPOSITORY / "kdsr" / "train.py"
    bare = [sys.executable, "-S", str(script), "-opt", str(option_file), "--local-rank", "0"]
    done = call(*bare, cwd=tmp_path, PYTHONPATH=sysconfig.get_path("purelib"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "experiments/run/models/net_g_latest.pth").exists()

    assert values_of_a_test(option_file) == values(tmp_path / "experiments/run/metrics.csv")


def test_option_errors_exit_with_2_and_write_nothing(option_file: Path, tmp_path: Path) -> None:
    done = call(
        sys.executable, "-m", "kdsr.cli", "train", "-opt", str(option_file), "--force_yml", "train:totl_iter=4",
        cwd=tmp_path, PYTHONPATH=str(REPOSITORY),
    )  # fmt: skip
    assert done.returncode == 2
    assert "total_iter" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".ckpt") == ["small.yml"]


@pytest.fixture
def dckd_file(dckd_options: dict[str, Any], tmp_path: Path) -> Path:
    dckd_options["datasets"]["train"].update(dataset_enlarge_ratio=4, batch_size_per_gpu=1)
    dckd_options["logger"]["save_checkpoint_freq"] = 2
    path = tmp_path / "dckd.yml"
    path.write_text(yaml.safe_dump(dckd_options), encoding="utf-8")
    return path


@pytest.mark.slow
def test_two_processes_train_one_student_under_gloo(dckd_file: Path, tmp_path: Path) -> None:
    """torchrun on the CPU. Each rank measures half of the images with its own EMA: all must be the saved one's."""
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(REPOSITORY / "kdsr" / "train.py"), "-opt", str(dckd_file), "--launcher", "pytorch", "--auto_resume",
    ]  # fmt: skip
    for total in (2, 4):
        done = call(*launch, "--force_yml", f"train:total_iter={total}", "val:val_freq=4", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (tmp_path / "experiments/run/metrics.csv").rename(tmp_path / f"{total}.csv")
    measured = values(tmp_path / "4.csv")
    assert list(measured) == ["astronaut", "cat", "coffee", "rocket"]
    assert values_of_a_test(dckd_file) == measured
    generators = torch.load(tmp_path / "experiments/run/training_states/4.state", weights_only=True)[
        "generators"
    ]
    assert len(generators) == 2
    assert not torch.equal(
        generators[0]["model"], generators[1]["model"]
    )  # each rank draws its own degradations


OWN_PROGRAM = """
import sys
import kdsr
from kdsr.distill.term import TERM_REGISTRY, Term
from kdsr.runtime.declarations import Options, loss, option
from kdsr.train import main

class OwnOptions(Options):
    own_opt: dict | None = loss("A loss.")
    own_share: float = option(0.5, "A share.", highest=1)

@TERM_REGISTRY.register()
class OwnTerm(Term):
    KEY, options = "own_opt", OwnOptions

    def losses(self, step):
        return {}

sys.exit(main(["-opt", "run.yml"]))
"""


def test_a_program_may_register_options_of_its_own(run_options: dict[str, Any], tmp_path: Path) -> None:
    run_options["train"] |= {"own_opt": {"type": "L1Loss"}, "own_share": 2}
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    command = [sys.executable, "-c", OWN_PROGRAM]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.strip() == "kdsr: error: train.own_share: 2 is above 1"
