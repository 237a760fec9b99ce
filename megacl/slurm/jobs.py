"""The jobs that were submitted for a run directory, as jobs/NUMBER/job.json remembers them (docs/formats.md)."""

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megacl.attempts import read_attempts
from megacl.errors import DataError
from megacl.slurm.queue import QueuedJob, find_jobs


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """One submission."""

    number: int
    kind: str
    job_id: str
    """SLURM's, of an array the whole one's."""
    script: str
    log: str
    """The path of its output; %A and %a in it stand for the number of an array and of its task."""
    array: str | None = None
    submitted: float = 0.0
    """Seconds since 1970."""
    after: tuple[str, ...] = ()
    """The jobs that it waits for."""


_ADAPTER = TypeAdapter(SubmittedJob)


def check_run(run_dir: Path) -> None:
    """Raises DataError where a path is no run directory."""
    if not any((run_dir / name).exists() for name in ("config.yaml", "jobs", "metrics.jsonl", "outcome.json")):
        what = "no run lies there" if run_dir.is_dir() else "no such folder"
        raise DataError(f"{run_dir}: {what}; name a run's run_dir.")


def read_jobs(run_dir: Path) -> list[SubmittedJob]:
    """The submissions of a run that SLURM has taken, oldest first; what cannot be read is passed over."""
    found = []
    for file in sorted((run_dir / "jobs").glob("*/job.json")):
        try:
            found.append(_ADAPTER.validate_json(file.read_bytes()))
        except (OSError, ValidationError):
            continue
    return sorted(found, key=lambda job: job.number)


def jobs_in_queue(run_dir: Path) -> list[QueuedJob]:
    """What SLURM knows of the jobs of a run, in the order of their submission.

    A number may have come to stand for somebody else's job since: only those whose script lies in the run directory,
    or is the one that was submitted, are the run's. Raises LaunchError where SLURM cannot be asked.
    """
    jobs = read_jobs(run_dir)
    ids = [job.job_id for job in jobs] + [attempt.job for attempt in read_attempts(run_dir) if attempt.job]
    order = {job_id: place for place, job_id in enumerate(dict.fromkeys(ids))}
    scripts = {job.script for job in jobs}
    folders = tuple({f"{place(run_dir / 'jobs')}/" for place in (os.path.abspath, os.path.realpath)})
    found = [
        job
        for job in find_jobs(order)
        if job.script.startswith(folders) or any(f"{job.script} ".startswith(f"{script} ") for script in scripts)
    ]
    return sorted(found, key=lambda job: order.get(job.job_id.partition("_")[0], len(order)))
