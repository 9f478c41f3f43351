"""What is tried before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdsr import train as train_entry


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(options: dict[str, Any], override: str, capsys: pytest.CaptureFixture[str]) -> str:
    Path("run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml", "--force_yml", override]) == 2
    assert [path.name for path in Path().iterdir()] == ["run.yml"]
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("network_g:num_feat=1000000", "network_g: its weights"),
        ("network_g:num_block=100000", "network_g: more than 20,000 layers"),
        (
            "val:metrics:psnr:crop_border=-1.5",
            "val.metrics.psnr: calculate_psnr cannot measure held_out: TypeError",
        ),
        ("val:metrics:psnr:crop_border=48", "nothing is left of 96×96 pixels"),
        (
            "val:metrics:psnr:input_order=XYZ",
            "val.metrics.psnr: calculate_psnr cannot measure held_out: ValueError",
        ),
        (
            "datasets:train:num_worker_per_gpu=100000",
            "datasets.train.num_worker_per_gpu: 100000 is above 256",
        ),
        (
            "datasets:train:dataset_enlarge_ratio=.inf",
            "datasets.train.dataset_enlarge_ratio: inf is too much",
        ),
        ("train:optim_g:lr=.nan", "nan"),
        ("logger:wandb={project: mine}", "logger.use_tb_logger: must be true for logger.wandb.project"),
    ],
)
def test_slipped_numbers_cost_a_line_and_no_machine(
    run_options: dict[str, Any], override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(run_options, override, capsys)


def test_a_teacher_that_is_larger_than_the_machine(
    dckd_options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yml").write_text(yaml.safe_dump(dckd_options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml", "--force_yml", "network_t:num_feat=1000000"]) == 2
    assert "network_t: its weights need more than" in capsys.readouterr().err
    assert not Path("experiments").exists()
