"""Runs a Slurm cluster of one controller and two nodes on this machine."""

import contextlib
import ctypes
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable

DAEMONS = ("munged", "slurmctld", "slurmd")
# Daemons are often installed in directories that are not on a user's PATH.
PATH = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"
HOST = socket.gethostname().split(".")[0]

# JAX connects to the first node of a job by its name, so that node has the name of this
# machine. JAX derives the port of its coordinator from the number of the job, so the
# first number is a free port, too. A job that is queued again waits until its
# credentials expire, hence the short `cred_expire`.
CONFIG = """
ClusterName=test
FirstJobId={ports[0]}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
KillWait=30
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoSlurmError(Exception):
    """Slurm is not installed, or does not start."""


class Cluster:
    """A running cluster.

    Attributes:
      root: The directory of the cluster's files.
      environment: The environment variables with which commands find the cluster.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.environment = os.environ | {"SLURM_CONF": f"{root}/slurm.conf"}
        self.environment["PATH"] = PATH

    def run(self, *command: str, **keywords) -> str:
        """Runs a command and returns its output.

        Raises:
          subprocess.CalledProcessError: The command failed.
        """
        return subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=60,
            **keywords,
        ).stdout

    def job(self, number: str) -> dict[str, str]:
        """Returns the fields that `scontrol show job` prints for a job."""
        fields = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)


@contextlib.contextmanager
def cluster():
    """Starts a `Cluster`, and removes it completely at the end.

    Raises:
      NoSlurmError: The cluster cannot start; the message gives the reason.
    """
    for name in DAEMONS:
        if shutil.which(name, path=PATH) is None:
            raise NoSlurmError(f"{name} is not installed (`make slurm`, as root)")
    # pytest's own directories are too long: a socket's path may have 107 characters.
    root = pathlib.Path(tempfile.mkdtemp(prefix="slurm_"))
    daemons = []
    try:
        here = Cluster(root)
        _configure(root)
        _start(here, daemons)
        try:
            yield here
        finally:
            here.run("scancel", f"--user={getpass.getuser()}")
            _wait_until(lambda: not here.run("squeue", "--noheader"), 60)
    finally:
        # The controller and the nodes communicate through munged, so it ends last.
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(root)


def _configure(root: pathlib.Path) -> None:
    (root / "munge").mkdir(mode=0o755)
    (root / "state").mkdir()
    (root / "munge/key").write_bytes(os.urandom(128))
    (root / "munge/key").chmod(0o400)
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in free]
    config = CONFIG.format(root=root, host=HOST, ports=ports, user=getpass.getuser())
    (root / "slurm.conf").write_text(config)


def _start(here: Cluster, daemons: list[subprocess.Popen]) -> None:
    root = here.root
    munge = [f"--{name}={root}/munge/{name}" for name in ("socket", "pid-file")]
    munge += [f"--{name}={root}/munge/{name}" for name in ("log-file", "seed-file")]
    munge += [f"--key-file={root}/munge/key"]
    commands = [
        # --force allows a parent directory that everybody may write to, like /tmp.
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", name] for name in (HOST, f"{HOST}-2")),
    ]
    for command in commands:
        with open(root / "daemons.log", "ab") as log:
            daemon = subprocess.Popen(
                command,
                env=here.environment,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent,
            )
        daemons.append(daemon)
        if command[0] == "munged":
            _wait_until((root / "munge/socket").exists, 10)

    def idle() -> bool:
        if any(daemon.poll() is not None for daemon in daemons):
            raise TimeoutError
        states = here.run("sinfo", "--noheader", "--Node", "--format=%T").split()
        return states == ["idle", "idle"]

    try:
        _wait_until(idle, 30)
    except TimeoutError:
        lines = (root / "daemons.log").read_text().splitlines()
        errors = [line for line in lines if "fatal" in line or "error" in line]
        errors.sort(key=lambda line: "fatal" in line)
        raise NoSlurmError(f"Slurm does not start: {[*lines, *errors][-1]}") from None


def _end_with_parent() -> None:
    """Lets a daemon end when the process of the tests is killed."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _wait_until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if condition():
                return
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.2)
