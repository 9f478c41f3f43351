"""A Slurm cluster of two nodes on this machine, beside any other Slurm: own ports, keys, sockets, state and logs.

All of it lies in one temporary folder, but for a line in the hosts file: ``127.0.0.1 kdsr1 kdsr2``. The daemons are
stopped by their process ids.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

MOST_JOBS = 40  # of one test session
NODES = ("kdsr1", "kdsr2")  # of no other machine, for the line would hide it
HOSTS = Path("/etc/hosts")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "sinfo", "scancel")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONF = """
ClusterName=kdsr_tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=kdsr1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=kdsr2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=kdsr[1-2] Default=YES PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=kdsr[1-2] PriorityTier=2
"""


def why_not() -> str | None:
    """The reason why there can be no cluster here; None when there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "its daemons need root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing; tests/cluster/install.sh installs it)"
    if not os.access(HOSTS, os.W_OK):
        return f"{HOSTS} cannot be written"
    return None


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _first_job() -> int:
    """A job id from which on the ports that kdsr derives from job ids are free here, whoever else runs a cluster."""
    while True:
        first = random.randrange(1, 100_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for job in range(first, first + MOST_JOBS):
                stack.enter_context(socket.socket()).bind(("", 12000 + job * 101 % 20000))
            return first


class TwoNodes:
    """The cluster, for the time of a ``with`` block."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kdsr-slurm-"))
        self.hosts_line = f"127.0.0.1 {' '.join(NODES)}  # {self.folder.name}"
        self.daemons: list[subprocess.Popen[bytes]] = []
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment = {
            **inherited, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH, "OMP_NUM_THREADS": "1"
        }  # fmt: skip

    def __enter__(self) -> TwoNodes:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root")
            self._wait(lambda: not self.run("squeue", "--noheader"), 10, "jobs are still there")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # In place, for in a container the file is often a mount that cannot be replaced.
        lines = HOSTS.read_text(encoding="utf-8").splitlines(keepends=True)
        HOSTS.write_text("".join(line for line in lines if line.strip() != self.hosts_line), encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self.folder.chmod(0o711)  # munged wants its socket to be reachable for all
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        conf = CONF.format(
            folder=self.folder,
            host=socket.gethostname().split(".")[0],
            ports=_free_ports(3),
            first_job=_first_job(),
        )
        (self.folder / "slurm.conf").write_text(conf, encoding="utf-8")
        hosts = HOSTS.read_text(encoding="utf-8")
        end = "" if hosts.endswith("\n") else "\n"
        HOSTS.write_text(f"{hosts}{end}{self.hosts_line}\n", encoding="utf-8")

        files = ("socket", "key", "pid", "seed", "log")
        munge = [
            f"--{name}{'' if name == 'socket' else '-file'}={self.folder}/munge.{name}" for name in files
        ]
        self._daemon("munged", "--foreground", *munge)
        self._wait((self.folder / "munge.socket").exists, 10, "munged does not start")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.states() == ["idle", "idle"], 60, "the nodes do not become idle")

    def states(self) -> list[str]:
        """Of the two nodes."""
        return self.run(
            "sinfo", "--Node", "--partition=all", "--noheader", "--format=%T", check=False
        ).split()

    def _daemon(self, *words: str) -> None:
        # A test process that is killed takes its daemons with it, where util-linux is there.
        guard = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv", path=SEARCH) else ()
        with open(self.folder / f"{len(self.daemons)}-{words[0]}.out", "wb") as out:
            self.daemons.append(
                subprocess.Popen(
                    [*guard, *words], env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
                )
            )

    def _wait(self, reached: object, seconds: float, failure: str) -> None:
        end = time.monotonic() + seconds
        while not reached():  # type: ignore[operator]
            for daemon in self.daemons:
                if daemon.poll() is not None:
                    raise RuntimeError(f"{daemon.args} ended with {daemon.returncode}\n{self.logs()}")
            if time.monotonic() > end:
                raise RuntimeError(f"{failure} within {seconds:g} s\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        found = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in found)

    def run(self, *words: str, check: bool = True, timeout: float = 120, **more: str) -> str:
        """Runs a command on the cluster and gives its stdout. ``more``: the working directory as ``cwd``."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=timeout, cwd=more.get("cwd")
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}"
            )
        return done.stdout
