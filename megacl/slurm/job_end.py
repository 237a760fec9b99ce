"""What a job script asks once its ranks have ended: how the attempt ended, and what is next.

    megacl job-end RUN --status 137 --since 1795900000 --max-restarts 5      # prints "again 30", and why on stderr

The highest of the ranks' exit statuses is all that srun hands on, and torchrun hands on none. So what counts is what
the ranks have left in the run directory (attempts.py); the status says more only where they left nothing.
"""

import dataclasses
import os
import re
from pathlib import Path

from megacl.attempts import (
    Attempt,
    Outcome,
    begin_attempt,
    read_attempts,
    read_outcome,
    write_outcome,
)
from megacl.errors import CheckpointError
from megacl.holders import job_here
from megacl.log import last_records
from megacl.slurm.restarts import Decision, Ended, decide
from megacl.verdict import conclude, verdict

_SLACK = 2.0
"""Seconds by which the clock of a rank's node may be behind that of the script's, which is rank 0's."""


def end_attempt(
    run_dir: Path, *, status: int, since: float, max_restarts: int, first_wait: int
) -> tuple[Outcome, Decision]:
    """Records how the ranks ended that were started at `since`, and decides what is next.

    status: the launcher's. max_restarts, first_wait: as of `decide`. Raises DataError where the disk refuses,
    CheckpointError where a record is damaged.
    """
    job = job_here()[0]
    attempt = next((each for each in read_attempts(run_dir)[-1:] if each.time >= since), None)
    outcome = _never_began(run_dir, status, since) if attempt is None else _ended(run_dir, attempt, status)
    attempts = [each for each in read_attempts(run_dir) if each.job == job]
    history = [Ended(each.step, read_outcome(run_dir, each.number) or _no_end(each)) for each in attempts]
    nodes = max(len(each.nodes) for each in attempts) or int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    saved = saved_step(run_dir)
    return outcome, decide(history, saved=saved, max_restarts=max_restarts, nodes=nodes, first_wait=first_wait)


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, by its name; 0 where there is none."""
    names = (path.parent.name for path in run_dir.glob("checkpoints/step-*/manifest.json"))
    return max((int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)), default=0)


def _ended(run_dir: Path, attempt: Attempt, status: int) -> Outcome:
    outcome = conclude(run_dir, attempt, status)
    last = _recorded_step(run_dir)
    if last is not None and outcome.step is not None and last > outcome.step and outcome.outcome == "lost_rank":
        outcome = dataclasses.replace(outcome, step=last)  # a rank that was alone has said nothing of its steps
        write_outcome(run_dir, outcome)
    return outcome


def _never_began(run_dir: Path, status: int, since: float) -> Outcome:
    """Records an attempt whose ranks ended before they held the run: what one of them has said, or the status."""
    try:
        said = read_outcome(run_dir)
    except CheckpointError:
        said = None
    attempt = begin_attempt(run_dir, ranks=(), step=saved_step(run_dir), started=since)
    if said is not None and said.attempt is None and said.time >= since - _SLACK:
        outcome = dataclasses.replace(said, attempt=attempt.number, step=attempt.step)
    else:
        outcome = verdict(attempt, (), status)
    write_outcome(run_dir, outcome)
    return outcome


def _no_end(attempt: Attempt) -> Outcome:
    """Of an attempt that was killed together with its job script, as where a node is lost."""
    return Outcome(
        outcome="lost_rank",
        exit_status=1,
        step=None,
        message="the job was ended from outside, or lost a node",
        attempt=attempt.number,
        job=attempt.job,
    )


def _recorded_step(run_dir: Path) -> int | None:
    """The last step that metrics.jsonl has, if there is one."""
    steps = [record["step"] for record in last_records(run_dir / "metrics.jsonl") if record.get("kind") == "step"]
    return int(steps[-1]) if steps else None
