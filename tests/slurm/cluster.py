"""A real Slurm cluster of one node on loopback, with its own configuration and state, for as long as tests run.

munged, slurmctld and slurmd run in the foreground as children of this process, so that exactly these processes are
ended in any case; the machine's own Slurm or munge, if there is one, is neither used nor changed.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

CPUS = 8  # more than many machines have: these jobs are small, and array tasks must run in parallel
KILL_WAIT_S = 10
GRACE_S = 20  # of the partition that is preempted: between SIGTERM and the end
START_S = 60.0
_PR_SET_PDEATHSIG = 1


class ClusterError(RuntimeError):
    """The cluster did not come up; the message holds the end of its logs."""


class Cluster:
    """`with Cluster(folder) as cluster:`; commands find it through `cluster.environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start("munged", "--foreground", "--force", *self._munge_options())
            self._until("munge answers", lambda: (self.folder / "munge/socket").exists())
            self._start("slurmctld", "-D", "-i", "-f", self.environment["SLURM_CONF"])
            self._until("slurmctld answers", lambda: self.call("scontrol", "ping").returncode == 0)
            self._start("slurmd", "-D", "-f", self.environment["SLURM_CONF"])
            self._until("the node is idle", lambda: "idle" in self.call("sinfo", "-h", "-o", "%t").stdout.split())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Cancel what runs, then end the daemons in the opposite order of their start."""
        if self._daemons:
            self.call("scancel", "--user", str(os.getuid()), "--full")
            limit = time.monotonic() + 2 * KILL_WAIT_S
            while time.monotonic() < limit and self.call("squeue", "-h").stdout.strip():
                time.sleep(0.2)
        for _, daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A Slurm command on this cluster."""
        return subprocess.run(
            words, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False
        )

    def logs(self) -> str:
        """The end of every daemon's log."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-25:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _start(self, program: str, *options: str) -> None:
        path = shutil.which(program) or f"/usr/sbin/{program}"
        with (self.folder / f"{program}.log").open("ab") as log:
            # a session of its own: Ctrl-C ends the tests first, and they end the daemons
            daemon = subprocess.Popen(
                [path, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._daemons.append((program, daemon))

    def _until(self, what: str, condition: object) -> None:
        limit = time.monotonic() + START_S
        while time.monotonic() < limit:
            dead = [name for name, daemon in self._daemons if daemon.poll() is not None]
            if dead:
                raise ClusterError(f"{', '.join(dead)} ended\n{self.logs()}")
            if condition():  # type: ignore[operator]
                return
            time.sleep(0.1)
        raise ClusterError(f"waited {START_S:.0f} s until {what}\n{self.logs()}")

    def _munge_options(self) -> list[str]:
        folder = self.folder / "munge"
        return [
            f"--key-file={folder / 'key'}",
            f"--socket={folder / 'socket'}",
            f"--pid-file={folder / 'pid'}",
            f"--seed-file={folder / 'seed'}",
            f"--log-file={folder / 'log'}",
        ]

    def _configure(self) -> None:
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        key = self.folder / "munge/key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        controller, node = free_ports(2)
        host = socket.gethostname().partition(".")[0]
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "slurm.conf").write_text(
            f"""\
ClusterName=surgstage-tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={_user()}
SlurmdUser={_user()}
SlurmctldPort={controller}
SlurmdPort={node}
# loopback alone
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
# cred_expire is also how long a requeued job is held back, two minutes by default
AuthInfo=socket={self.folder / "munge/socket"},cred_expire=10
CredType=cred/munge
StateSaveLocation={self.folder / "state"}
SlurmdSpoolDir={self.folder / "spool"}
SlurmctldPidFile={self.folder / "slurmctld.pid"}
SlurmdPidFile={self.folder / "slurmd.pid"}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait={KILL_WAIT_S}
InactiveLimit=0
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={CPUS} RealMemory=2048 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=tests Nodes={host} Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=OFF
PartitionName=scavenge Nodes={host} MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_S}
PartitionName=urgent Nodes={host} MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
"""
        )


def free_ports(count: int) -> list[int]:
    """TCP ports that are free at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies, so that even kill -9 leaves no daemon behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind `with` blocks, as Ctrl-C does."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
