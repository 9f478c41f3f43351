"""Process groups: what the launchers' environments become, what is refused, what ranks tell each other."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdsr.runtime import distributed
from kdsr.runtime.distributed import agree_on, gather_batches, gather_lists, init_distributed
from kdsr.runtime.errors import OptionError

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = re.compile(r"SLURM_|MASTER_|RANK$|WORLD_SIZE$|LOCAL_|TORCHELASTIC_")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No launcher's variables, neither before nor after."""
    before = dict(os.environ)
    for name in before:
        if NAMES.match(name):
            del os.environ[name]
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


def slurm_step(job: int, step: int, nodes: str = "localhost", rank: int = 0, world: int = 1) -> None:
    """The variables that srun gives a task."""
    os.environ.update(
        SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step), SLURM_NODELIST="elsewhere", SLURM_STEP_NODELIST=nodes,
        SLURM_PROCID=str(rank), SLURM_LOCALID="0", SLURM_NTASKS=str(world),
    )  # fmt: skip


def port_of(job: int, step: int) -> int:
    os.environ.pop("MASTER_PORT", None)
    slurm_step(job, step)
    distributed._slurm_to_torch_environment(None)
    return int(os.environ["MASTER_PORT"])


def test_steps_and_jobs_have_ports_of_their_own() -> None:
    ports = [port_of(job, step) for job in range(1_000_000, 1_000_020) for step in range(10)]
    assert len(set(ports)) == len(ports)
    assert min(ports) > 1024 and max(ports) < 32768


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-[08,10-12],login", "gpu-08"),
        ("login,gpu-[08,10-12]", "login"),
        ("rack[2-3,7]node[01-16]-ib,n1", "rack2node01-ib"),
    ],
)
def test_the_first_node_has_rank_0(nodes: str, first: str) -> None:
    slurm_step(1, 0, nodes)
    distributed._slurm_to_torch_environment(None)
    assert os.environ["MASTER_ADDR"] == first


@pytest.mark.parametrize("nodes", ["", "n[1-2", "[", ",n1", "n1]"])
def test_a_node_list_that_cannot_be_read(nodes: str) -> None:
    with pytest.raises(OptionError, match="cannot be read; set MASTER_ADDR"):
        distributed._first_node(nodes)


def test_what_the_user_sets_counts() -> None:
    slurm_step(1, 0)
    os.environ["MASTER_ADDR"] = "10.0.0.7"
    distributed._slurm_to_torch_environment(29501)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "29501")


def test_a_batch_script_without_srun_is_no_step() -> None:
    slurm_step(1, 0, world=2)
    del os.environ["SLURM_STEP_ID"]
    with pytest.raises(OptionError, match="one process of a job of 2 tasks; start it with srun"):
        init_distributed("slurm")


@pytest.mark.parametrize(("launcher", "name"), [("pytorch", "RANK"), ("slurm", "SLURM_PROCID")])
def test_without_the_launcher(launcher: str, name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is not set; start it with"):
        init_distributed(launcher)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torch_environment(rank: int, world: int, address: str, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR=address, MASTER_PORT=str(port))


def test_an_address_that_nobody_knows() -> None:
    torch_environment(0, 2, "no-such-node.invalid", free_port())
    with pytest.raises(OptionError, match="no-such-node.invalid, cannot be resolved on .*set MASTER_ADDR"):
        init_distributed("pytorch")


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


@pytest.mark.parametrize(
    ("visible", "local", "torchrun", "device"),
    [(4, 3, True, 3), (1, 3, False, 0), (2, 2, False, None), (1, 1, True, None)],
)
def test_each_process_takes_a_gpu_of_its_own(
    visible: int, local: int, torchrun: bool, device: int | None, environment: pytest.MonkeyPatch
) -> None:
    """Slurm with one GPU per task shows each task a single one; torchrun's processes see all of them."""
    taken: list[int] = []
    environment.setattr(torch.cuda, "device_count", lambda: visible)
    environment.setattr(torch.cuda, "set_device", taken.append)
    os.environ["LOCAL_RANK"] = str(local)
    if torchrun:
        os.environ["LOCAL_WORLD_SIZE"] = "4"
    if device is None:
        with pytest.raises(OptionError, match="has no GPU of its own"):
            distributed._take_gpu("nccl")
    else:
        distributed._take_gpu("nccl")
    assert taken == ([] if device is None else [device])


def test_alone_there_is_nobody_to_ask() -> None:
    batch = torch.ones(2, 3, requires_grad=True)
    gathered = gather_batches(batch)
    assert torch.equal(gathered, batch) and not gathered.requires_grad
    assert gather_lists([1, 2]) == [1, 2]
    assert agree_on("full") == "full" and agree_on(None) is None


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
assert agree_on(None) is None
assert agree_on("disk full" if rank == 0 else None) == "disk full"
assert agree_on(f"error of rank {rank}") == "error of rank 0"
assert gather_lists([rank] * (rank + 1)) == [0, 1, 1]
leave_distributed(orderly=True)
print("done")
"""


def ranks(*commands: tuple[list[str], dict[str, str]]) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(words, env=env | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for words, more in commands
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "done\n"), err


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
