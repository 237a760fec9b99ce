"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, all in one folder of /tmp.

    with Cluster() as cluster:
        job = cluster.submit("--nodes=2", "train.sbatch", "my.yaml")
        job.wait_for_end(timeout=60)

A process of its own keeps the cluster until the one that entered it leaves or is gone, be it by a SIGKILL: then it
cancels the jobs, ends the daemons and removes the folder. There is no accounting: what is known of a job comes from
slurmctld, which remembers ended jobs for five minutes.
"""

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
PACKAGES = "munge slurmctld slurmd slurm-client"
# Debian keeps daemons where only root's PATH looks.
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"

# Nodes are named by addresses, so that a node's name resolves without a change to /etc/hosts. They declare CPUs and
# memory that the machine may not have (config_overrides), and nothing here needs cgroups. KillOnBadExit is set as sites
# set it that do not know of megacl. cred_expire is also how long a requeued job waits before it starts again: 120 s by
# default.
CONFIG = """\
ClusterName=megacl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
FirstJobId={first_job}
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0
KillOnBadExit=1
KillWait={kill_wait}
NodeName=127.0.1.1 NodeHostname={host} Port={ports[1]} CPUs=2
NodeName=127.0.1.2 NodeHostname={host} Port={ports[2]} CPUs=2
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def need_programs() -> None:
    """Where some of the cluster's programs are not installed, the test skips, and fails in CI."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        why = f"no SLURM here ({', '.join(missing)} missing): apt-get install --no-install-recommends {PACKAGES}"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)


@dataclass(frozen=True)
class JobState:
    """What slurmctld says of a job."""

    name: str
    """RUNNING, COMPLETED, FAILED, ..."""
    exit_code: str
    """The batch script's exit status and the signal that ended it: "2:0"."""
    restarts: int

    @property
    def ended(self) -> bool:
        return self.name in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """Runs while it is entered. What is wrong with it is an AssertionError that ends with the daemons' last lines."""

    def __init__(self, *settings: str, kill_wait: int = 10) -> None:
        """settings: further lines of slurm.conf. kill_wait: seconds between the signals that ask a job to end, and the
        one that ends it."""
        self._settings, self._kill_wait = settings, kill_wait

    def __enter__(self) -> "Cluster":
        # Sockets lie in it, and a socket's path has at most 107 bytes: pytest's own folders are too deep.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        # Settings of a job or a cluster that these tests run in must not reach the commands.
        foreign = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SCANCEL", "SQUEUE", "SINFO")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
            "PATH": PATH,
            "SLURM_CONF": f"{self.folder}/slurm.conf",
        }
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        # Two clusters on one machine must not have jobs of one number, by which ranks know one another.
        config = CONFIG.format(
            kill_wait=self._kill_wait,
            first_job=random.randrange(1, 10**6),
            folder=self.folder,
            host=host,
            user=user,
            ports=_free_ports(3),
        )
        (self.folder / "slurm.conf").write_text("\n".join([*self._settings, config]))
        with open(self.folder / "keeper.log", "ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, __file__],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in the terminal is not for it
            )
        try:
            _wait(lambda: self._idle_nodes() == 2, timeout=240)
        except TimeoutError:
            problem = f"the cluster does not come up\n{self._last_lines()}"
            self.__exit__()
            raise AssertionError(problem) from None
        return self

    def __exit__(self, *error: object) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(timeout=600)

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 240
    ) -> str:
        """What one of SLURM's commands prints; AssertionError with its complaint where it fails."""
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
        return done.stdout.strip()

    def kill_daemon(self, node: str) -> None:
        """Kills a node's slurmd, as where the node is lost: what runs there runs on, and nobody hears of it."""
        os.kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)

    def submit(self, *arguments: str, environment: Mapping[str, str], cwd: Path) -> "Job":
        """sbatch with these arguments, in this environment and folder."""
        number = self.run("sbatch", "--parsable", *arguments, environment=environment, cwd=cwd)
        return Job(self, number, cwd)

    def _idle_nodes(self) -> int:
        try:
            return self.run("sinfo", "--noheader", "--Node", "--partition=test", "--format=%T").split().count("idle")
        except (AssertionError, subprocess.TimeoutExpired):
            return 0  # slurmctld does not answer yet

    def _last_lines(self) -> str:
        logs = [log.read_text(errors="replace").splitlines()[-10:] for log in sorted(self.folder.glob("*.log"))]
        return "\n".join(line for lines in logs for line in lines)


@dataclass(frozen=True)
class Job:
    cluster: Cluster
    number: str
    folder: Path
    """Where it was submitted, and where its log lies under the name `NUMBER.log`."""

    def state(self) -> JobState:
        shown = self.cluster.run("scontrol", "show", "job", "--oneliner", self.number)
        fields = dict(field.partition("=")[::2] for field in shown.split(" "))
        return JobState(fields["JobState"], fields["ExitCode"], int(fields["Restarts"]))

    @property
    def log(self) -> str:
        """What its tasks have written so far."""
        path = self.folder / f"{self.number}.log"
        return path.read_text() if path.exists() else ""

    def task(self, rank: int) -> int:
        """The process of a rank."""
        conf = self.cluster.folder / "slurm.conf"
        marks = {f"SLURM_CONF={conf}", f"SLURM_JOB_ID={self.number}", f"SLURM_PROCID={rank}"}
        for process in sorted(int(path.name) for path in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(OSError):  # another user's, or gone meanwhile
                environment = set(Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0"))
                # The tasks of a step alone have its number; the job's script passes for rank 0 else.
                if marks <= environment and any(each.startswith("SLURM_STEP_ID=") for each in environment):
                    return process
        raise AssertionError(f"job {self.number} has no rank {rank} running\n{self.log}")

    def wait_until(self, condition: Callable[[], bool], *, timeout: float) -> None:
        """Returns once the condition holds; AssertionError where the job ends without it, or takes too long."""
        deadline = time.monotonic() + timeout
        while True:
            state = self.state()
            if condition():
                return
            assert not state.ended, f"job {self.number} has ended: {state}\n{self.log}"
            assert time.monotonic() < deadline, f"job {self.number} takes more than {timeout:g} s\n{self.log}"
            time.sleep(0.1)

    def wait_for_end(self, *, timeout: float) -> JobState:
        """The state in which it ended; AssertionError where that takes longer than timeout seconds."""
        self.wait_until(lambda: self.state().ended, timeout=timeout)
        return self.state()


def _wait(condition: Callable[[], bool], *, timeout: float) -> None:
    """Returns once the condition holds; TimeoutError where that takes longer than timeout seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; below those that systems give to connections, which come at any moment."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(30000, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports += [port] if port not in ports else []
    return ports


def keep() -> None:
    """Runs the daemons of the cluster in this folder until standard input ends, then takes everything down."""
    folder = Path.cwd()
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    munge = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    # --force: it does not like that others may write to /tmp, on the way to the folder.
    munge += ["--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock"]
    daemons = [subprocess.Popen(["munged", *munge], stdin=subprocess.DEVNULL)]
    with contextlib.suppress(TimeoutError, subprocess.SubprocessError):
        _wait((folder / "munge.sock").exists, timeout=120)
        for command in (["slurmctld"], ["slurmd", "-N", "127.0.1.1"], ["slurmd", "-N", "127.0.1.2"]):
            daemons.append(subprocess.Popen([*command, "-D"], stdin=subprocess.DEVNULL))
        sys.stdin.read()

        subprocess.run(["scancel", "--user", getpass.getuser()], timeout=240)
        _wait(lambda: not subprocess.check_output(["squeue", "--noheader"], timeout=60), timeout=60)
    for daemon in reversed(daemons):  # munged last: without it the others cannot speak to one another
        daemon.terminate()
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    shutil.rmtree(folder)


if __name__ == "__main__":
    keep()
