"""What a run is doing: `read_status(run_dir)`, from its files and, where there is SLURM, its jobs in the queue.

A run that SLURM has forgotten, or that never saw SLURM, is told from its files alone. Nothing is asked of processes.
"""

import dataclasses
import itertools
import math
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megacl.attempts import Attempt, Outcome, read_attempts, read_outcome
from megacl.errors import LaunchError
from megacl.page import duration, short
from megacl.slurm.jobs import SubmittedJob, check_run, jobs_in_queue, read_jobs
from megacl.slurm.progress import Progress, read_progress
from megacl.slurm.queue import QueuedJob
from megacl.slurm.reasons import explain

State = Literal["queued", "requeued", "starting", "running", "ending", "ended", "lost", "new"]
"""requeued: waits to go on. starting: has its nodes, and no step yet. lost: it has no end, and nobody is at work."""

_WORDS: dict[str, str] = {
    "done": "done",
    "stopped": "it was told to stop, and saved",
    "wrong_input": "something is wrong with what it was given",
    "diverged": "it diverged",
    "lost_rank": "a rank was lost",
    "hung": "nothing moved on any more",
    "no_rendezvous": "its ranks did not meet",
    "unhealthy": "a node failed the check before the first step",
    "unreachable": "its data could not be reached",
    "fenced": "a later start has taken the run",
    "failed": "it failed",
}
_OF_SLURM: dict[str, str] = {
    "COMPLETED": "its job is over",
    "CANCELLED": "it was cancelled",
    "TIMEOUT": "its time limit ended it before it had saved",
    "NODE_FAIL": "SLURM lost a node of its",
    "OUT_OF_MEMORY": "a node's memory did not suffice",
    "PREEMPTED": "another job took its place",
    "BOOT_FAIL": "a node did not start",
    "DEADLINE": "its deadline came",
}


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What a run is doing; None for what is not known."""

    run_dir: str
    state: State
    why: str
    """Why it waits, what it does, or how it ended."""
    do: str | None = None
    """What can be done about it."""
    outcome: str | None = None
    """Of outcome.json, where it has ended."""
    exit_status: int | None = None
    job: str | None = None
    """SLURM's number."""
    nodes: str = ""
    time_left: float | None = None
    """Seconds until the job's time limit; None where it has none."""
    starts: float | None = None
    """When SLURM expects it to start, seconds since 1970."""
    restarts: int = 0
    causes: tuple[str, ...] = ()
    """Why it was started again, oldest first."""
    progress: Progress = field(default_factory=Progress)
    estimated_end: float | None = None
    """Seconds since 1970, if it goes on as it does."""
    slurm: str | None = None
    """Why SLURM could not be asked."""

    def tree(self) -> dict[str, Any]:
        """For JSON: all of it, flat."""
        tree = dataclasses.asdict(self)
        progress = tree.pop("progress")
        progress["checkpoint"] = str(self.progress.checkpoint) if self.progress.checkpoint else None
        return {**tree, **progress, "seconds_left": self.progress.seconds_left}


def read_status(run_dir: Path, *, now: float | None = None) -> RunStatus:
    """What a run is doing. Raises DataError where a path is no run directory, CheckpointError at a damaged outcome."""
    check_run(run_dir)
    jobs, attempts = read_jobs(run_dir), read_attempts(run_dir)
    slurm, queued = None, list[QueuedJob]()
    if jobs or any(attempt.job for attempt in attempts):
        try:
            queued = jobs_in_queue(run_dir)
        except LaunchError as error:
            slurm = str(error)
    progress = read_progress(run_dir, since=attempts[-1].started if attempts else 0.0)
    status = RunStatus(
        run_dir=str(run_dir),
        state="new",
        why="nothing has begun",
        progress=progress,
        restarts=max(0, len(attempts) - 1),
        causes=tuple(_cause(run_dir, *pair) for pair in itertools.pairwise(attempts)),
        nodes=" ".join(attempts[-1].nodes) if attempts else "",
        slurm=slurm,
    )
    alive = [job for job in queued if not job.ended]
    if alive:
        return _of_job(status, alive, attempts, run_dir, time.time() if now is None else now)
    if (process := _holder(run_dir)) is not None:
        ends = _end(progress, time.time() if now is None else now)
        return dataclasses.replace(status, state="running", why=f"process {process} here", estimated_end=ends)
    return _ended(status, queued, jobs, read_outcome(run_dir), attempts)


def _of_job(
    status: RunStatus, alive: Sequence[QueuedJob], attempts: Sequence[Attempt], run_dir: Path, now: float
) -> RunStatus:
    """Of a run with a job in the queue; one that runs tells more than those that wait behind it."""
    job = next((job for job in alive if not job.waiting), alive[0])
    begun = any(attempt.job == job.job_id for attempt in attempts)
    status = dataclasses.replace(status, job=job.job_id)
    if job.waiting:
        found = explain(job.reason)
        do = found.do.format(job=job.job_id) if found.do else None
        if found.nodes:
            do = f"wait for them, or go on with fewer nodes: {_fewer(run_dir)}"
        elif found.never and do and do.startswith("cancel it"):
            do = f"{do}: megacl cancel {shlex.quote(str(run_dir))}"
        why = f"{found.why}: it will not start by itself" if found.never else found.why
        return dataclasses.replace(
            status, state="requeued" if begun else "queued", why=why, do=do, starts=job.start, nodes=""
        )
    status = dataclasses.replace(
        status,
        nodes=job.nodes,
        time_left=None if job.time_left == math.inf else job.time_left,
        estimated_end=_end(status.progress, now),
    )
    if job.state == "COMPLETING":
        return dataclasses.replace(status, state="ending", why="SLURM is ending its processes", estimated_end=None)
    outcome = read_outcome(run_dir)
    if job.state == "SUSPENDED":
        return dataclasses.replace(status, state="starting", why="it is suspended")
    if outcome is not None and outcome.job == job.job_id:
        why = f"{_WORDS[outcome.outcome]}{_who(outcome)}; the job decides what is next, or waits before the next start"
        return dataclasses.replace(status, state="starting", why=why, estimated_end=None)
    began = max(job.start or 0.0, *(attempt.started for attempt in attempts[-1:]), 0.0)
    if (status.progress.time or 0.0) < began or status.progress.time is None:
        return dataclasses.replace(status, state="starting", why="its ranks start, no step is done yet")
    return dataclasses.replace(status, state="running", why="it trains")


def _ended(
    status: RunStatus,
    queued: Sequence[QueuedJob],
    jobs: Sequence[SubmittedJob],
    outcome: Outcome | None,
    attempts: Sequence[Attempt],
) -> RunStatus:
    """Of a run that nobody is at work on."""
    status = dataclasses.replace(status, job=jobs[-1].job_id if jobs else status.job)
    again = shlex.join(["megacl", "submit", *_frozen(Path(status.run_dir))]) if jobs else "the same command goes on"
    last = queued[-1] if queued else None
    unseen = last is not None and not any(attempt.job == last.job_id for attempt in attempts)
    if outcome is not None and not (unseen and last is not None and last.state == "CANCELLED"):
        words = _WORDS[outcome.outcome]
        why = words if outcome.outcome == "done" else f"{words}{_who(outcome)}: {outcome.message}"
        do = None if outcome.outcome == "done" else f"to go on: {again}"
        return dataclasses.replace(
            status, state="ended", why=why, do=do, outcome=outcome.outcome, exit_status=outcome.exit_status
        )
    if last is not None:
        why = _OF_SLURM.get(last.state, f"its job failed ({last.reason})")
        return dataclasses.replace(status, state="ended", why=why, do=f"to go on: {again}", job=last.job_id)
    if status.progress.steps is not None and status.progress.checkpoint_step == status.progress.steps:
        return dataclasses.replace(status, state="ended", why="done", outcome="done", exit_status=0)
    if jobs or attempts or status.progress.step:
        forgotten = "" if status.slurm else f"SLURM knows job {jobs[-1].job_id} no more, and " if jobs else ""
        why = f"{forgotten}nothing says how it ended: it was killed with its node or its job"
        return dataclasses.replace(status, state="lost", why=why, do=f"to go on: {again}")
    return status


def _cause(run_dir: Path, attempt: Attempt, after: Attempt) -> str:
    """Why an attempt was followed by another one."""
    outcome = read_outcome(run_dir, attempt.number)
    if outcome is None:
        return f"step {after.step:,}: attempt {attempt.number} has no end: it was killed with its node or its job"
    return f"step {after.step:,}: {outcome.outcome}{_who(outcome)}: {outcome.message}"


def _who(outcome: Outcome) -> str:
    """Whose fault it was, where that is known."""
    if outcome.rank is None:
        return f" ({outcome.node})" if outcome.node else ""
    return f" (rank {outcome.rank}{f' on {outcome.node}' if outcome.node else ''})"


def _end(progress: Progress, now: float) -> float | None:
    return None if progress.seconds_left is None else now + progress.seconds_left


def _frozen(run_dir: Path) -> list[str]:
    """The arguments of `megacl submit` that say again what was submitted last."""
    folders = sorted(path.parent for path in (run_dir / "jobs").glob("*/job.json"))
    if not folders:
        return ["CONFIG.yaml", "--cluster", "NAME"]
    return [str(folders[-1] / "config.yaml"), "--cluster", str(folders[-1] / "cluster.yaml")]


def _fewer(run_dir: Path) -> str:
    """The commands that put a job in its place that asks for fewer nodes."""
    cancel = shlex.join(["megacl", "cancel", str(run_dir)])
    return f"{cancel}; {shlex.join(['megacl', 'submit', *_frozen(run_dir)])} cluster.nodes=N"


def _holder(run_dir: Path) -> int | None:
    """The process of this machine that holds the run's lock. It is looked up: trying to lock would disturb a start."""
    try:
        inode = os.stat(run_dir / ".lock").st_ino
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if "FLOCK" in fields and "->" not in fields and fields[5].rpartition(":")[2] == str(inode):
            return int(fields[4])
    return None


# ---------------------------------------------------------------------------------------------- as text


def status_text(status: RunStatus, *, now: float | None = None) -> Iterator[str]:
    """Lines for a terminal."""
    now = time.time() if now is None else now
    job = f", job {status.job}" if status.job else ""
    nodes = f" on {status.nodes}" if status.nodes and status.state in ("running", "starting", "ending") else ""
    yield f"{status.run_dir}: {status.state}{job}{nodes}: {status.why}"
    if status.do:
        yield f"  do        {status.do}"
    if status.starts is not None and status.starts > now:
        yield f"  starts    {_moment(status.starts)}, as SLURM expects"
    yield from _progress_text(status.progress, now)
    if status.time_left is not None:
        yield f"  limit     {duration(status.time_left)} left of the job's time"
    yield from _end_text(status)
    if status.restarts:
        yield f"  restarts  {status.restarts}"
        yield from (f"            {cause}" for cause in status.causes[-5:])
    if status.slurm:
        yield f"  slurm     {status.slurm}"


def _progress_text(progress: Progress, now: float) -> Iterator[str]:
    of = f" of {progress.steps:,}" if progress.steps is not None else ""
    facts = [f"{progress.step:,}{of}"]
    if progress.phase is not None:
        facts.append(f"phase {progress.phase}")
    if progress.loss is not None:
        facts.append(f"loss {progress.loss:.4f}")
    if progress.tokens is not None:
        facts.append(f"{short(progress.tokens)} tokens seen")
    if progress.tokens_per_second is not None:
        facts.append(f"{short(progress.tokens_per_second)} tokens/s")
    if progress.time is not None:
        facts.append(f"{duration(max(0.0, now - progress.time))} ago")
    yield f"  step      {', '.join(facts)}"
    if progress.checkpoint is not None:
        yield f"  saved     step {progress.checkpoint_step:,}, {progress.checkpoint}"


def _end_text(status: RunStatus) -> Iterator[str]:
    left = status.progress.seconds_left
    if status.state in ("ended", "ending", "new") or not left:
        return
    if status.estimated_end is None:
        yield f"  left      {duration(left)} of training, as fast as before"
    elif status.time_left is not None and left > status.time_left:
        yield f"  left      {duration(left)} of training: it goes on behind the job's time limit"
    else:
        yield f"  end       about {_moment(status.estimated_end)}, in {duration(left)}"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
