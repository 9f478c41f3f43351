"""More loader processes than cores: one warning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import ranks
from kdsr.runtime.cpu_cores import cores_of_this_node, workers_warning
from small_runs import run

Options = dict[str, Any]
cores = st.frozensets(st.integers(0, 15), min_size=1)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(0, 256), st.lists(cores, min_size=1, max_size=8))
def test_the_number_that_is_advised_fits(per_process: int, places: list[frozenset[int]]) -> None:
    """Processes may share the node's cores (torchrun) or have some each (Slurm)."""
    warning = workers_warning(per_process, places)
    available = len(frozenset().union(*places))
    assert (warning is None) == (per_process * len(places) <= available)
    if warning is not None:
        assert f" {available} CPU core" in warning and f" {per_process} loader processes" in warning
        advised = int(warning.rsplit("set ", 1)[1].split()[0])
        assert workers_warning(advised, places) is None
        assert workers_warning(advised + 1, places) is not None


def test_the_cores_of_a_process_are_those_that_it_may_use() -> None:
    (own,) = cores_of_this_node()
    assert own == os.sched_getaffinity(0)


def test_a_run_warns_once(
    run_options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.chdir(tmp_path)
    few = len(os.sched_getaffinity(0))
    run_options["datasets"]["train"]["num_worker_per_gpu"] = few + 1
    assert run(run_options) == 0
    output = f"datasets.train.num_worker_per_gpu: {few + 1} loader processes"
    assert capsys.readouterr().err.count(output) == 1
    assert [found for found in recwarn if "DataLoader" in str(found.message)] == []
    run_options["datasets"]["train"]["num_worker_per_gpu"] = 1
    assert run(run_options) == 0
    assert "loader processes" not in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_of_a_node_warn_once(run_options: Options, tmp_path: Path) -> None:
    few = len(os.sched_getaffinity(0))
    run_options["datasets"]["train"].update(num_worker_per_gpu=few, batch_size_per_gpu=1)
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    processes = ranks.start(tmp_path, ["-opt", "run.yml"])
    assert ranks.finish(processes) == [0, 0]
    first, second = (process.log.read_text(encoding="utf-8") for process in processes)
    assert first.count(f"{few} loader processes in each of 2 processes") == 1
    assert "loader processes" not in second and "DataLoader" not in first + second
