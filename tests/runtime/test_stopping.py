"""Stop signals to this process, to a process with loader workers, to one of two ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdsr.options.check import check
from kdsr.runtime.errors import StoppedEarly
from kdsr.runtime.stopping import STOP_SIGNALS, StopRequest, ignore_stop_signals

REPOSITORY = Path(__file__).resolve().parents[2]


def send(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_the_first_signal_is_only_recorded(name: str, capfd: pytest.CaptureFixture[str]) -> None:
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
        (["SIGTERM", "SIGKILL"], "stop_signals.1: 'SIGKILL' is not a signal"),
        (
            ["sigusr1"],
            "stop_signals.0: 'sigusr1' is not a signal that can stop a run; did you mean SIGUSR1?",
        ),
        ([15], "stop_signals.0: 15 is not a signal"),
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


def kill(pid: int, name: str) -> None:
    """Sends a signal from a process that is not the worker's parent; to a group if ``pid`` is negative."""
    subprocess.run(
        [sys.executable, "-S", "-c", f"import os, signal; os.kill({pid}, signal.{name})"],
        check=True, start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def spared() -> Iterator[int]:
    """A waiting process that ignores signals like a loader worker."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        ignore_stop_signals(0)
        os.write(tell, b".")
        while True:
            time.sleep(0.01)
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    yield child
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_worker_ignores_all_but_the_second_sigterm_of_others(spared: int) -> None:
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2", "SIGTERM"):
        kill(spared, name)
        time.sleep(0.1)
        assert os.waitpid(spared, os.WNOHANG) == (0, 0), name
    kill(spared, "SIGTERM")
    assert os.WTERMSIG(os.waitpid(spared, 0)[1]) == signal.SIGTERM


@pytest.mark.parametrize("before", [[], ["SIGTERM"], ["SIGINT", "SIGUSR1", "SIGUSR2"]])
def test_a_worker_ends_at_the_first_sigterm_of_its_main_process(spared: int, before: list[str]) -> None:
    for name in before:
        kill(spared, name)
        time.sleep(0.1)
    os.kill(spared, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(spared, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == (spared, 0)


def start(code: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Runs ``code`` in a new session, so that a signal to its group reaches only its workers."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


WITH_WORKERS = """
import os, signal, subprocess, sys
from torch.utils.data import DataLoader
from kdsr.runtime.stopping import StopRequest, blocked_signals, ignore_stop_signals
send = f"import os, signal; os.killpg({os.getpgid(0)}, signal.{sys.argv[1]})"
with StopRequest() as stop:
    stop.training = True
    with blocked_signals():
        batches = iter(DataLoader(range(100), num_workers=2, worker_init_fn=ignore_stop_signals))
        # before the workers can have handlers, and from a process of another group
        subprocess.run([sys.executable, "-S", "-c", send], check=True, start_new_session=True)
        assert stop.agreed() is None
    print(stop.agreed(), sum(int(batch) for batch in batches))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_a_signal_to_the_group_leaves_the_workers_at_work(name: str) -> None:
    process = start(WITH_WORKERS, name)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{name} {sum(range(100))}\n"), err


NOBODY_SHUTS_DOWN = """
import multiprocessing, sys, time
from torch.utils.data import DataLoader
from kdsr.runtime.stopping import StopRequest, blocked_signals, ignore_stop_signals
stop = StopRequest().__enter__()
stop.training = True
with blocked_signals():
    batches = iter(DataLoader(range(100), num_workers=2, persistent_workers=True, worker_init_fn=ignore_stop_signals))
next(batches)
multiprocessing.Process(target=time.sleep, args=(3600,), daemon=True).start()  # somebody else's
multiprocessing.util.Finalize(None, print, [batches], exitpriority=0)
sys.exit(75)
"""


def test_a_process_ends_without_a_shutdown_of_its_workers() -> None:
    """multiprocessing sends each of its processes one SIGTERM, and waits."""
    process = start(NOBODY_SHUTS_DOWN)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, err


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
def test_two_ranks_stop_at_the_same_call(tmp_path: Path) -> None:
    ranks = [start(TWO_RANKS, RANK=str(rank), STORE=f"file://{tmp_path}/store") for rank in range(2)]
    for rank in ranks:
        assert rank.stdout and rank.stdout.readline() == "ready\n"
    time.sleep(0.2)
    ranks[1].send_signal(signal.SIGUSR1)
    (signalled, _), (other, _) = (rank.communicate(timeout=60) for rank in reversed(ranks))
    call, *seen = signalled.split()
    assert seen == ["SIGUSR1", "SIGUSR1"]
    assert other.split() == [call, "SIGUSR1", "None"]


LOST_READER = """
import os, socket, sys, time
from multiprocessing import resource_sharer
from kdsr.runtime.stopping import hide_lost_connections

if sys.argv[1] == "quiet":
    hide_lost_connections()
address, key = resource_sharer.DupFd(os.open(os.devnull, os.O_RDONLY))._id
for _ in range(3):  # a reader that is killed while it says who it is
    reader = socket.socket(socket.AF_UNIX)
    reader.connect(address)
    reader.close()
time.sleep(0.5)
sys.excepthook(ValueError, ValueError("of the main thread"), None)
"""


@pytest.mark.parametrize("mode", ["quiet", "plain"])
def test_a_worker_prints_nothing_when_its_main_process_was_killed(mode: str) -> None:
    worker = start(LOST_READER, mode)
    _, message = worker.communicate(timeout=60)
    assert "of the main thread" in message
    assert ("Traceback" in message) == (mode == "plain")
