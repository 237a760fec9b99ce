"""SLURM, through its commands: nothing else in megacl runs them, but for the scripts of slurm/."""

import math
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacl.errors import LaunchError
from megacl.job_states import ENDED, WAITING

_OF_A_JOB = re.compile(r"SLURM_(?!CONF$|CLUSTERS$)|(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$")
"""Variables of a job, or of ranks, that may be around who submits: another job must not take them for its own."""


def check_sbatch() -> None:
    """Raises LaunchError where there is no sbatch."""
    if shutil.which("sbatch") is None:
        raise LaunchError("there is no sbatch here; submit from a machine of the cluster, or look with --dry-run.")


def submit_script(script: Path, *, options: Sequence[str] = ()) -> str:
    """Queues a script and returns the job's id. Raises LaunchError with SLURM's reason where it takes none.

    options: of sbatch, before the script; they win over its #SBATCH lines.
    """
    check_sbatch()
    command = ["sbatch", "--parsable", *options, str(script)]
    environment = {name: value for name, value in os.environ.items() if not _OF_A_JOB.match(name)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()).removeprefix("sbatch: ")
        raise LaunchError(f"sbatch does not take {script}: {reason}")
    return done.stdout.strip().partition(";")[0]


_FORMAT = "%i|%T|%u|%N|%S|%e|%L|%r|%o"
"""Of squeue. Reasons may hold anything but |, and the script's path stands last, since it may hold that too."""


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A job as SLURM knows it now, or a task of an array."""

    job_id: str
    """12; 12_3 for a task of an array."""
    state: str
    """PENDING, RUNNING, COMPLETED, ..."""
    user: str
    nodes: str
    """As SLURM writes lists, node[1-2]; empty where it has none."""
    start: float | None
    """When it began, or is expected to begin; seconds since 1970."""
    end: float | None
    """When it ended, or is ended at the latest."""
    time_left: float | None
    """Seconds of its time limit, inf where it has none."""
    reason: str
    """Why it waits, or how it ended: Priority, Resources, ..."""
    script: str
    """The path of its script, and the words that were given to it."""

    @property
    def ended(self) -> bool:
        """Whether it is over, and only remembered for some minutes more."""
        return self.state in ENDED

    @property
    def waiting(self) -> bool:
        """Whether it has no nodes yet, or not any more."""
        return self.state in WAITING


def find_jobs(job_ids: Iterable[str]) -> list[QueuedJob]:
    """Those of the jobs that SLURM knows: waiting, running, or ended some minutes ago (its MinJobAge).

    Raises LaunchError where SLURM cannot be asked.
    """
    listed = ",".join(dict.fromkeys(job_ids))
    if not listed:
        return []
    try:
        said = _run(["squeue", "--noheader", "--array", "--states=all", f"--jobs={listed}", f"--format={_FORMAT}"])
    except LaunchError as error:
        if "Invalid job id" in str(error):  # it says so only where it knows none of them
            return []
        raise
    return [_parse(line) for line in said.splitlines() if line.count("|") >= _FORMAT.count("|")]


def user_here() -> str:
    """This user's name as squeue prints it, whatever the environment says."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def forbid_requeue(job_id: str) -> None:
    """From here on neither SLURM nor the job itself can put it into the queue again. Raises LaunchError."""
    _run(["scontrol", "update", f"JobId={job_id}", "Requeue=0"])


def tell_to_save(job_id: str) -> None:
    """Sends a job's script what it gets before its time limit: the ranks save and end. Raises LaunchError."""
    _run(["scancel", "--batch", "--signal=USR1", job_id])


def cancel_job(job_id: str) -> None:
    """Takes a job out of the queue, or ends it: TERM, and KILL some seconds later. Raises LaunchError."""
    _run(["scancel", job_id])


def _run(command: list[str]) -> str:
    """What one of SLURM's commands prints; LaunchError with its reason where it fails."""
    if shutil.which(command[0]) is None:
        raise LaunchError(f"there is no {command[0]} here; ask on a machine of the cluster.")
    try:
        # Some write times in a form of their own, by a variable.
        environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command[0]} does not answer within 60 s; try again later.") from None
    if done.returncode:
        raise LaunchError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout


def _parse(line: str) -> QueuedJob:
    job_id, state, user, nodes, start, end, left, reason, script = line.split("|", _FORMAT.count("|"))
    return QueuedJob(
        job_id=job_id,
        state=state,
        user=user,
        nodes=nodes,
        start=_moment(start),
        end=_moment(end),
        time_left=_seconds(left),
        reason=reason,
        script=script,
    )


def _moment(text: str) -> float | None:
    """Seconds since 1970 of a local time; None for N/A."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _seconds(text: str) -> float | None:
    """Of [DAYS-]HOURS:MINUTES:SECONDS, the first of which may be missing; None for INVALID."""
    if text == "UNLIMITED":
        return math.inf
    days, _, clock = text.rpartition("-")
    try:
        hours, minutes, seconds = [0, 0, *map(int, clock.split(":"))][-3:]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds
    except ValueError:
        return None
