"""The launchers' environments, and their checks before a process group is created."""

from __future__ import annotations

import os

import pytest
import torch

from kdsr.runtime.distributed import init_distributed
from kdsr.runtime.errors import OptionError
from kdsr.runtime.launchers import first_node, select_gpu, to_torch_environment
from runtime.environments import free_port, slurm_step, torch_environment

pytestmark = pytest.mark.usefixtures("no_launcher")


def port_of(job: int, step: int) -> int:
    os.environ.pop("MASTER_PORT", None)
    slurm_step(job, step)
    to_torch_environment("slurm", None)
    return int(os.environ["MASTER_PORT"])


def test_steps_and_jobs_have_unique_ports() -> None:
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
    assert first_node(nodes) == first


def test_the_step_may_have_other_nodes_than_the_job() -> None:
    slurm_step(1, 0, nodes="localhost")
    to_torch_environment("slurm", None)
    assert (os.environ["SLURM_NODELIST"], os.environ["MASTER_ADDR"]) == ("elsewhere", "localhost")


@pytest.mark.parametrize("nodes", ["", "n[1-2", "[", ",n1", "n1]"])
def test_a_node_list_that_cannot_be_read(nodes: str) -> None:
    with pytest.raises(OptionError, match="cannot be read; set MASTER_ADDR"):
        first_node(nodes)


def test_user_settings_take_precedence() -> None:
    slurm_step(1, 0)
    os.environ["MASTER_ADDR"] = "10.0.0.7"
    to_torch_environment("slurm", 29501)
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


def test_an_unknown_address() -> None:
    torch_environment(0, 2, "no-such-node.invalid", free_port())
    with pytest.raises(OptionError, match="no-such-node.invalid, cannot be resolved on .*set MASTER_ADDR"):
        init_distributed("pytorch")


@pytest.mark.parametrize(
    ("visible", "local", "torchrun", "device"),
    [(4, 3, True, 3), (1, 3, False, 0), (2, 2, False, None), (1, 1, True, None)],
)
def test_each_process_takes_a_gpu_of_its_own(
    visible: int, local: int, torchrun: bool, device: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one GPU per task, Slurm shows each task a single one; torchrun's processes see all."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    os.environ["LOCAL_RANK"] = str(local)
    if torchrun:
        os.environ["LOCAL_WORLD_SIZE"] = "4"
    if device is None:
        with pytest.raises(OptionError, match="has no GPU of its own"):
            select_gpu("nccl")
    else:
        select_gpu("nccl")
    assert taken == ([] if device is None else [device])


def torchs() -> None:
    torch_environment(1, 2, "localhost", 29500)
    os.environ["LOCAL_RANK"] = "1"


@pytest.mark.parametrize("value", ["", " ", "x", "-1", "1.5", "0x1", "1e3", "٣", "7" * 20])
@pytest.mark.parametrize(
    ("launcher", "name"),
    [("pytorch", name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
    + [("slurm", f"SLURM_{name}") for name in ("PROCID", "NTASKS", "LOCALID", "JOB_ID", "STEP_ID")],
)
def test_a_variable_that_is_no_number_is_named(launcher: str, name: str, value: str) -> None:
    torchs() if launcher == "pytorch" else slurm_step(1, 0)
    to_torch_environment(launcher, None)  # as it is, it is right
    os.environ.pop("MASTER_PORT") if launcher == "slurm" else None
    os.environ[name] = value
    with pytest.raises(OptionError) as caught:
        to_torch_environment(launcher, None)
    assert f"{name} is {value!r}, not a whole number" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("RANK", "2", "from 0 to 1"),
        ("LOCAL_RANK", "2", "from 0 to 1"),
        ("WORLD_SIZE", "0", "from 1 on"),
        ("MASTER_PORT", "0", "from 1 to 65535"),
        ("MASTER_PORT", "65536", "from 1 to 65535"),
    ],
)
def test_a_number_that_cannot_be(name: str, value: str, wanted: str) -> None:
    torchs()
    os.environ[name] = value
    with pytest.raises(OptionError, match=f"{name} is {value}, not a number {wanted}"):
        to_torch_environment("pytorch", None)


def test_an_empty_address_is_not_this_machine() -> None:
    torch_environment(0, 1, "", 29500)
    with pytest.raises(OptionError, match="MASTER_ADDR is empty"):
        to_torch_environment("pytorch", None)
