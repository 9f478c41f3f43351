"""Process groups: joining, collectives, and a rank that dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kdsr.runtime.distributed import (
    explain_lost_ranks,
    gather_batches,
    gather_lists,
    init_distributed,
)
from kdsr.runtime.errors import OptionError
from runtime.environments import free_port, slurm_step, torch_environment

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("no_launcher")


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        slurm_step(1, 0, world=2)
        taken = other.getsockname()[1]
        with pytest.raises(OptionError, match=f"port {taken} of localhost is taken .*dist_params.port"):
            init_distributed("slurm", {"port": taken})


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_never_come(rank: int) -> None:
    torch_environment(rank, 2, "localhost", free_port())
    begin = time.monotonic()
    with pytest.raises(OptionError, match=rf"rank {rank} of 2 .* within 1 s \(dist_params.timeout\)"):
        init_distributed("pytorch", {"timeout": 1})
    assert time.monotonic() - begin < 60  # not torch's half hour


def test_a_backend_that_is_not_there() -> None:
    torch_environment(0, 1, "localhost", free_port())
    with pytest.raises(OptionError, match="dist_params.backend: 'glo' is not available"):
        init_distributed("pytorch", {"backend": "glo"})


def test_a_single_process() -> None:
    batch = torch.ones(2, 3, requires_grad=True)
    gathered = gather_batches(batch)
    assert torch.equal(gathered, batch) and not gathered.requires_grad
    assert gather_lists([1, 2]) == [1, 2]


# ------------------------------------------------------------------------------------------------ two real processes

RANK = """
import sys, torch
import torch.distributed as dist
from kdsr.runtime.distributed import *
from kdsr.runtime.errors import TrainingError
init_distributed(sys.argv[1], {"timeout": 60})
rank = dist.get_rank()
batch = (torch.arange(6.0).reshape(3, 2) + 10 * rank).requires_grad_()
both = gather_batches(batch.T)  # not contiguous
assert both.shape == (4, 3) and not both.requires_grad
assert torch.equal(both, torch.cat([torch.arange(6.0).reshape(3, 2).T + 10 * r for r in range(2)]))
try:
    gather_batches(torch.ones(3 - rank, 2))
    raise SystemExit("unequal shapes were gathered")
except TrainingError as error:
    assert "(3, 2), (2, 2) on ranks 0 to 1" in str(error), error
assert gather_lists([rank] * (rank + 1)) == [0, 1, 1]
leave_distributed(wait=True)
print("done")
exit_rank(0)
"""


def run_all(*commands: tuple[list[str], dict[str, str]]) -> list[tuple[int, str, str]]:
    """Runs commands at the same time; their exit codes, stdout and stderr."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(words, env=env | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for words, more in commands
    ]
    output = [process.communicate(timeout=120) for process in running]
    return [(process.returncode, *texts) for process, texts in zip(running, output, strict=True)]


def ranks(*commands: tuple[list[str], dict[str, str]]) -> None:
    for code, out, err in run_all(*commands):
        assert (code, out) == (0, "done\n"), err


LOSES = """
import os, signal, sys
import torch.distributed as dist
from kdsr.runtime.distributed import *
from kdsr.runtime.errors import report_errors
def run():
    with explain_lost_ranks():
        init_distributed("slurm")
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            gather_lists([1])
sys.exit(exit_rank(report_errors(run)))
"""


@pytest.mark.slow
def test_a_dead_rank_is_reported_by_the_others() -> None:
    steps = []
    for rank in range(2):
        slurm_step(4712, 0, rank=rank, world=2)
        steps.append(([sys.executable, "-c", LOSES], dict(os.environ)))
    reports, _ = run_all(*steps)
    assert reports[0] == 1
    (line,) = (line for line in reports[2].splitlines() if line.startswith("kdsr"))
    assert line.startswith("kdsr: error: rank 0 has lost another rank (") and "--auto_resume" in line
    assert "Traceback" not in reports[2]


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="^timed out$"), explain_lost_ranks():
        raise RuntimeError("timed out")


@pytest.mark.slow
def test_two_nodes_of_torchrun(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    port = free_port()
    ranks(
        *(
            ([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}",
              "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}",
              str(tmp_path / "rank.py"), "pytorch"], {})
            for node in range(2)
        )
    )  # fmt: skip


@pytest.mark.slow
def test_two_tasks_of_a_slurm_step() -> None:
    steps = []
    for rank in range(2):
        slurm_step(4711, 3, rank=rank, world=2)
        steps.append(([sys.executable, "-c", RANK, "slurm"], dict(os.environ)))
    ranks(*steps)
