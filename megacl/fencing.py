"""Fencing: of all starts of a run, which are its incarnations, only the newest may write in the run directory.

    with hold_run(run_dir, warn) as fence:      # on rank 0; the other ranks receive the fence
        ...
        fence.check()                           # before anything is published; FencedError where a later start is there

Why a lock is not enough: SLURM gives up a node that it does not hear from, and starts the job anew, while the node's
processes may go on, and hold their lock. So each start takes a number, which stands in RUN/incarnation.json, and every
publisher asks whether that is still its own, last before it renames. A later start first takes the number, then deletes
what earlier ones have not published, and only then looks for the newest checkpoint. So an earlier one that asked a
moment too early has either published before that look, or finds its file gone when it renames. Records are appended to
a file that was opened before the number was taken, and that the later start has replaced by another one.

Two starts that both have a right to the run are kept apart by the lock (publish.py), or, on a file system that has
none, by what incarnation.json says of the earlier one. It is over where its job is not one that runs in SLURM's eyes,
or where it is an earlier start of the same job.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megacl.errors import DataError, FencedError
from megacl.holders import Holder, holder_of
from megacl.job_states import ENDED, WAITING
from megacl.publish import alone_in, publish_text, sweep_unfinished

FILE = "incarnation.json"
_PUBLISHED = ("config.yaml", "lineage.json", "metrics.jsonl", FILE)
"""What a run's ranks publish in its directory itself."""
_SECONDS = 30
"""For which a command of SLURM's may take to answer."""


@dataclass(frozen=True)
class Incarnation:
    """One start of a run, as it stands in incarnation.json."""

    number: int
    """1, 2, ... in the order of the starts."""
    mark: str
    """Which no other start has, whatever became of the file meanwhile."""
    holder: Holder
    """Rank 0's process."""
    ended: float | None = None
    """When it ended by itself, in seconds since 1970; None: it is under way, or was killed."""

    def __str__(self) -> str:
        return f"incarnation {self.number}, {self.holder}"

    def dump(self) -> str:
        """The file's content."""
        tree = {"number": self.number, **self.holder.tree(), "ended": self.ended, "mark": self.mark}
        return json.dumps(tree, indent=1) + "\n"


def _parse(content: bytes) -> Incarnation | None:
    """What a file says; None where it is torn or something else."""
    try:
        tree = json.loads(content)
    except ValueError:
        return None
    holder = holder_of(tree)
    if holder is None or not isinstance(tree.get("number"), int) or not isinstance(tree.get("mark"), str):
        return None
    ended = tree.get("ended")
    return Incarnation(tree["number"], tree["mark"], holder, ended if isinstance(ended, float | int) else None)


def read_incarnation(run_dir: Path) -> Incarnation | None:
    """The newest start of a run; None where it never began. Raises DataError where the file is torn or unreadable."""
    path = run_dir / FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    found = _parse(content)
    if found is None:
        raise DataError(f"{path}: is damaged; delete it once no process of this run is at work any more.")
    return found


@dataclass(frozen=True)
class Fence:
    """What one start of a run asks before it publishes; the same on all its ranks."""

    run_dir: Path
    own: Incarnation

    def check(self) -> None:
        """Raises FencedError where this start is not the newest, or where nothing says so any more.

        Where the file cannot be read at all (a mount that is lost), nobody knows: DataError.
        """
        path = self.run_dir / FILE
        try:
            newest = _parse(path.read_bytes())
        except FileNotFoundError:
            if not self.run_dir.is_dir():
                raise DataError(f"{self.run_dir}: is not there; is the disk?") from None
            raise FencedError(f"fenced: {path} is gone, without which {self._this} writes nothing more.") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
        if newest is None:
            raise FencedError(f"fenced: {path} is damaged, without which {self._this} writes nothing more.")
        if newest.mark != self.own.mark:
            raise FencedError(f"fenced: {newest} has taken the run {self.run_dir}; {self._this} writes nothing more.")

    @property
    def _this(self) -> str:
        return f"this start of the run, its incarnation {self.own.number},"


@contextlib.contextmanager
def hold_run(run_dir: Path, warn: Callable[[str], None]) -> Iterator[Fence]:
    """Makes the run directory and holds it alone as its newest incarnation; what unfinished saves have left is deleted.

    A start that SLURM has given up loses the run, which `warn` is told. Raises DataError where another start is at
    work that has a right to it, FencedError where this one is an earlier start of the job that holds it.
    """
    here = Holder.here()

    def has_lost(holder: Holder) -> bool:
        lost = is_lost(holder)
        if lost:
            warn(f"{run_dir}: {holder} is taken to be lost, and may write nothing there any more")
        return lost

    with alone_in(run_dir, "another run", has_lost) as locked:
        before = _before(run_dir, here, warn, locked=locked)
        own = Incarnation(before.number + 1 if before else 1, secrets.token_hex(8), here)
        publish_text(run_dir / FILE, own.dump(), "which start of the run is its newest")
        fence = Fence(run_dir, own)
        for name in _PUBLISHED:
            sweep_unfinished(run_dir, name)
        sweep_unfinished(run_dir / "checkpoints")
        try:
            yield fence
        finally:
            ended = Incarnation(own.number, own.mark, here, time.time())
            with contextlib.suppress(DataError, FencedError):
                publish_text(run_dir / FILE, ended.dump(), "that this start of the run has ended", fence.check)


def _before(run_dir: Path, here: Holder, warn: Callable[[str], None], *, locked: bool) -> Incarnation | None:
    """The start before this one, which is over; raises where it is not, or nothing says so."""
    try:
        before = read_incarnation(run_dir)
    except DataError as error:
        if not locked:
            raise
        warn(f"{error} The run's starts are counted from 1 again")
        return None
    if before is None:
        return None
    same_job = here.job is not None and (before.holder.cluster, before.holder.job) == (here.cluster, here.job)
    if same_job and before.holder.restart > here.restart:
        raise FencedError(f"fenced: {before} has taken the run {run_dir}; this is an earlier start of that job.")
    if not locked and before.ended is None and not is_over(before.holder, here):
        raise DataError(
            f"{run_dir}: {before} may be at work there, and this file system has no locks that would tell; wait for "
            f"it, or stop it. Where it was killed, delete {run_dir / FILE}."
        )
    return before


def who_has_taken(run_dir: Path, *, since: float) -> str | None:
    """Why a job script has no say in a run, in one line: another start has it, or is to have it. None: it has.

    The script of a node that SLURM has given up may go on as its ranks may, and would requeue the job that is anew
    under way. since: when its ranks were started, in seconds since 1970.
    """
    here = Holder.here()
    try:
        newest = read_incarnation(run_dir)
        if newest is not None and newest.holder.job == here.job:
            if newest.holder.restart > here.restart:
                return f"{newest} has taken the run"
        elif newest is not None:
            if newest.holder.time >= since:
                return f"{newest} has taken the run"
            with alone_in(run_dir, "another run"):
                pass
    except DataError as error:
        return str(error)
    if here.job is not None and (restarts := _restarts(here.job)) is not None and restarts > here.restart:
        return f"SLURM has requeued job {here.job} meanwhile, and has given up this start of it"
    return None


def is_lost(holder: Holder) -> bool:
    """Whether a process that holds a lock has no right to it any more: its job is over, as `is_over` says."""
    return holder.job is not None and is_over(holder, Holder.here())


def is_over(holder: Holder, here: Holder) -> bool:
    """Whether a holder has no right to go on, though its process may: False where that is not known.

    An earlier start of the same job has none, nor has an earlier srun of it that has ended; nor has a job that SLURM
    does not know as running. A process of this machine that is not there has none either.
    """
    if holder.job is None:
        return holder.node == socket.gethostname() and not _is_alive(holder.pid)
    if holder.cluster is None or holder.cluster != (here.cluster or _cluster_here()):
        return False
    if holder.job == here.job:
        if holder.restart != here.restart:
            return holder.restart < here.restart
        return holder.step != here.step and _step_is_over(f"{holder.job}.{holder.step}")
    return _job_is_over(holder.job)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# These few questions to SLURM stand here, since a start of a run asks them, which knows nothing of submitting jobs.


def _answer(*command: str) -> tuple[str, str] | None:
    """What a command prints, and what it complains of; None where it cannot be asked."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip(), done.stderr.strip()


def _cluster_here() -> str | None:
    """The name of the cluster that this machine's commands speak to."""
    answer = _answer("scontrol", "show", "config")
    lines = answer[0].splitlines() if answer else []
    return next((line.split("=")[1].strip() for line in lines if line.startswith("ClusterName")), None)


def _job_is_over(job: str) -> bool:
    answer = _answer("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    if answer is None:
        return False
    said, complaint = answer
    if complaint:
        return "Invalid job id" in complaint  # which SLURM has forgotten
    return all(state in ENDED | WAITING for state in said.split())  # none of its processes may go on


def _restarts(job: str) -> int | None:
    """How often SLURM has requeued a job; None where it does not say."""
    answer = _answer("scontrol", "show", "job", "--oneliner", job)
    found = re.search(r" Restarts=(\d+) ", answer[0]) if answer else None
    return int(found[1]) if found else None


def _step_is_over(step: str) -> bool:
    answer = _answer("squeue", "--noheader", f"--steps={step}", "--format=%i")
    return answer is not None and not answer[1] and not answer[0]
