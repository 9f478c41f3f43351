"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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


def test_the_script_runs_from_anywhere_without_an_installation(option_file: Path, tmp_path: Path) -> None:
    """Isolated from the environment's site directory entry of the project: the checkout alone serves."""
    script = REPOSITORY / "kdsr" / "train.py"
    done = call(sys.executable, str(script), "-opt", str(option_file), "--local-rank", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "experiments/run/models/net_g_latest.pth").exists()

    test_options = yaml.safe_load(option_file.read_text())
    test_options["datasets"] = {"test_1": {**test_options["datasets"]["val"]}}
    test_options["path"]["pretrain_network_g"] = "experiments/run/models/net_g_latest.pth"
    test_options.pop("train"), test_options.pop("logger")
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test_options), encoding="utf-8")
    done = call(sys.executable, str(REPOSITORY / "kdsr" / "test.py"), "-opt", "test.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "psnr" in (tmp_path / "results/run/metrics.csv").read_text()


def test_option_errors_exit_with_2_and_write_nothing(option_file: Path, tmp_path: Path) -> None:
    done = call(
        sys.executable, "-m", "kdsr.cli", "train", "-opt", str(option_file), "--force_yml", "train:totl_iter=4",
        cwd=tmp_path, PYTHONPATH=str(REPOSITORY),
    )  # fmt: skip
    assert done.returncode == 2
    assert "total_iter" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".ckpt") == ["small.yml"]


@pytest.mark.slow
def test_two_processes_train_as_one_under_gloo(option_file: Path, tmp_path: Path) -> None:
    """torchrun on the CPU: both ranks hold the same weights, and each image is measured once."""
    done = call(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(REPOSITORY / "kdsr" / "train.py"), "-opt", str(option_file), "--launcher", "pytorch",
        "--force_yml", "datasets:train:dataset_enlarge_ratio=4",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "experiments/run/metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[3] for row in rows] == ["astronaut", "cat", "coffee", "rocket"]
