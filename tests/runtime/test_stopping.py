"""Stop requests, with real signals: to this process, to a process with loading workers, to one rank of two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kdsr.pipeline.option_check import check
from kdsr.runtime.errors import StoppedEarly
from kdsr.runtime.stopping import STOP_SIGNALS, StopRequest, spare_worker

REPOSITORY = Path(__file__).resolve().parents[2]


def send(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_the_first_signal_only_asks(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        stop.training = True
        assert stop.requested is None and stop.agreed() is None
        send(name)
        assert stop.requested == name and stop.agreed() == name
        send("SIGTERM")
        assert stop.requested == name
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"kdsr: {name}: finishing the iteration")


def test_a_second_interrupt_stops_at_once() -> None:
    with StopRequest() as stop:
        stop.training = True
        send("SIGTERM")
        send("SIGINT")
        assert stop.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")


def test_before_training_a_signal_stops_at_once() -> None:
    with StopRequest(), pytest.raises(StoppedEarly, match="stopped by SIGTERM .* nothing to save") as stopped:
        send("SIGTERM")
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        send("SIGINT")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_destructor_swallows_is_not_forgotten() -> None:
    class Swallows:
        def __del__(self) -> None:
            send("SIGUSR1")

    with StopRequest() as stop:
        Swallows()
        stop.training = True
        assert stop.agreed() == "SIGUSR1"


def test_only_the_signals_that_are_named_and_only_for_the_time_of_the_block() -> None:
    noted: list[int] = []
    before = {name: signal.getsignal(signal.Signals[name]) for name in STOP_SIGNALS}
    try:
        signal.signal(signal.SIGUSR2, lambda number, _: noted.append(number))
        with StopRequest(["SIGUSR1"]) as stop:
            stop.training = True
            send("SIGUSR2")
            assert noted == [signal.SIGUSR2] and stop.requested is None
        with pytest.raises(KeyError), StopRequest():
            raise KeyError
        send("SIGUSR2")
        assert noted == [signal.SIGUSR2] * 2
    finally:
        signal.signal(signal.SIGUSR2, before["SIGUSR2"])
    assert {name: signal.getsignal(signal.Signals[name]) for name in STOP_SIGNALS} == before


def test_outside_the_main_thread_nothing_is_handled() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def run() -> None:
        with StopRequest() as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.agreed()])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before, None]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (["SIGTERM", "SIGKILL"], "stop_signals.1: 'SIGKILL' is no signal"),
        (
            ["sigusr1"],
            "stop_signals.0: 'sigusr1' is no signal that can stop a run in order; did you mean SIGUSR1?",
        ),
        ([15], "stop_signals.0: 15 is no signal"),
        ("SIGTERM", "stop_signals: "),
    ],
)
def test_the_option_is_checked(run_options: dict[str, Any], value: Any, problem: str) -> None:
    run_options["stop_signals"] = value
    (found,) = check(run_options, is_train=True)
    assert found.startswith(problem)


@pytest.mark.parametrize("value", [list(STOP_SIGNALS), ["SIGHUP"], []])
def test_the_option_is_taken(run_options: dict[str, Any], value: list[str]) -> None:
    run_options["stop_signals"] = value
    assert check(run_options, is_train=True) == []


# ------------------------------------------------------------------------------------------ processes of their own


def test_a_spared_worker_ignores_all_but_the_second_sigterm() -> None:
    child = os.fork()
    if child == 0:
        spare_worker(0)
        os.kill(os.getppid(), 0)
        while True:
            time.sleep(0.01)
    time.sleep(0.3)  # until the child has its handlers
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGTERM"):
        os.kill(child, signal.Signals[name])
        time.sleep(0.1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), name
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def start(code: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Runs ``code`` in a session of its own, so that a signal to its group reaches its workers and nobody else."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


WITH_WORKERS = """
import os, signal, sys, time
from torch.utils.data import DataLoader
from kdsr.runtime.stopping import StopRequest, signals_held, spare_worker
with StopRequest() as stop:
    stop.training = True
    with signals_held():
        batches = iter(DataLoader(range(100), num_workers=2, worker_init_fn=spare_worker))
        os.killpg(0, signal.Signals[sys.argv[1]])  # before the workers can have handlers
        assert stop.agreed() is None
    print(stop.agreed(), sum(int(batch) for batch in batches))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_a_signal_to_the_group_leaves_the_workers_at_work(name: str) -> None:
    process = start(WITH_WORKERS, name)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{name} {sum(range(100))}\n"), err


TWO_RANKS = """
import os, time
import torch.distributed as dist
from kdsr.runtime.stopping import StopRequest
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=os.environ["STORE"], rank=rank, world_size=2)
with StopRequest() as stop:
    stop.training = True
    print("ready", flush=True)
    for call in range(2000):
        time.sleep(0.01 * (1 + rank))
        if name := stop.agreed():
            print(call, name, stop.requested, flush=True)
            break
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_call_when_one_is_asked(tmp_path: Path) -> None:
    ranks = [start(TWO_RANKS, RANK=str(rank), STORE=f"file://{tmp_path}/store") for rank in range(2)]
    for rank in ranks:
        assert rank.stdout and rank.stdout.readline() == "ready\n"
    time.sleep(0.2)
    ranks[1].send_signal(signal.SIGUSR1)
    (asked, _), (told, _) = (rank.communicate(timeout=60) for rank in reversed(ranks))
    call, *seen = asked.split()
    assert seen == ["SIGUSR1", "SIGUSR1"]
    assert told.split() == [call, "SIGUSR1", "None"]


LOST_READER = """
import os, socket, sys, time
from multiprocessing import resource_sharer
from kdsr.runtime.stopping import quiet_when_the_reader_is_gone

if sys.argv[1] == "quiet":
    quiet_when_the_reader_is_gone()
address, key = resource_sharer.DupFd(os.open(os.devnull, os.O_RDONLY))._id
for _ in range(3):  # a reader that is killed while it says who it is
    reader = socket.socket(socket.AF_UNIX)
    reader.connect(address)
    reader.close()
time.sleep(0.5)
sys.excepthook(ValueError, ValueError("of the main thread"), None)
"""


@pytest.mark.parametrize("mode", ["quiet", "plain"])
def test_a_worker_says_nothing_about_a_reader_that_was_killed(mode: str) -> None:
    worker = start(LOST_READER, mode)
    _, said = worker.communicate(timeout=60)
    assert "of the main thread" in said
    assert ("Traceback" in said) == (mode == "plain")
