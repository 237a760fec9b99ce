"""Cancelling a run: what trains saves first, what waits leaves the queue, and nothing starts it again.

A job that trains gets what it gets before its time limit, USR1 to its script, so that a save may take as long as there
(cluster.signal_seconds); `scancel` alone leaves it SLURM's KillWait, often 30 s. Before that its requeue is forbidden.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megacl.attempts import read_outcome
from megacl.configfile import load_cluster
from megacl.errors import ConfigError, LaunchError
from megacl.slurm.jobs import check_run, jobs_in_queue, read_jobs
from megacl.slurm.queue import QueuedJob, cancel_job, forbid_requeue, tell_to_save, user_here
from megacl.slurm.status import read_status

_GRACE = 60.0
"""Seconds beyond what a save is given: SLURM's scheduler and the processes' own ends take some."""
_KILLS = 600.0
"""Seconds until a job that SLURM was told to end is given up."""
_SAVES = "--signal=B:USR1"
"""In the script of a job that saves when it is told to."""


@dataclass(frozen=True)
class _Told:
    """A job that saves now."""

    job: QueuedJob
    patience: float
    """Seconds until it is ended without."""


def cancel_run(run_dir: Path, say: Callable[[str], None], *, pause: float = 1.0) -> None:
    """Ends all jobs of a run, and waits until they have ended. Where there are none, that is said.

    Raises LaunchError where a job belongs to somebody else, where SLURM cannot be asked, or where the run trains
    without SLURM; DataError where a path is no run directory.
    """
    check_run(run_dir)
    jobs = [job for job in jobs_in_queue(run_dir) if not job.ended]
    for job in jobs:
        if job.user != user_here():
            raise LaunchError(f"{run_dir}: job {job.job_id} is {job.user}'s; ask {job.user} to cancel it.")
    if not jobs:
        _nothing_to_do(run_dir, say)
        return
    told, arrays = [], set[str]()
    for job in sorted(jobs, key=lambda job: not job.waiting):  # what waits must not start in the place of what ends
        array, _, task = job.job_id.partition("_")
        if task and job.waiting:
            if array in arrays:  # all its tasks are out of the queue
                continue
            arrays.add(array)
        if (saving := _end(run_dir, job, say)) is not None:
            told.append(saving)
    _wait(run_dir, told, say, pause)
    _say_how_it_stands(run_dir, bool(told), say)


def _nothing_to_do(run_dir: Path, say: Callable[[str], None]) -> None:
    status = read_status(run_dir)
    if status.state == "running":
        raise LaunchError(
            f"{run_dir}: no job of SLURM's trains it, but {status.why}; Ctrl-C there, or kill -TERM: it saves and ends."
        )
    say(f"{run_dir}: no job of it is in the queue; {status.state}: {status.why}")


def _end(run_dir: Path, job: QueuedJob, say: Callable[[str], None]) -> _Told | None:
    """Takes a job out of the queue, or tells it to save; None where nothing is to be waited for."""
    whole = job.job_id.partition("_")[0]
    submitted = {each.job_id: each.script for each in read_jobs(run_dir)}
    script = Path(submitted.get(whole) or job.script.partition(" ")[0])
    saves = script.is_file() and _SAVES in script.read_text(encoding="utf-8", errors="replace")
    if job.state != "RUNNING" or not saves or "_" in job.job_id:
        cancel_job(whole)
        what = f"waited ({job.reason}) and is out of the queue" if job.waiting else "is told to end"
        say(f"job {job.job_id} {what}")
        return None if job.waiting else _Told(job, 0.0)
    patience = _save_seconds(script) + _GRACE
    forbid_requeue(job.job_id)
    tell_to_save(job.job_id)
    say(f"job {job.job_id} is told to save and to end; waiting for it, {patience:.0f} s at most")
    return _Told(job, patience)


def _save_seconds(script: Path) -> float:
    """How long the job may take for its save."""
    try:
        return load_cluster(str(script.parent / "cluster.yaml")).signal_seconds
    except ConfigError:
        return 120.0


def _wait(run_dir: Path, told: list[_Told], say: Callable[[str], None], pause: float) -> None:
    """Until the jobs have ended; those that take too long are ended by SLURM."""
    begun, killed = time.monotonic(), set[str]()
    while told:
        there = {job.job_id for job in jobs_in_queue(run_dir) if not job.ended}
        told = [each for each in told if each.job.job_id in there]
        waited = time.monotonic() - begun
        for each in told:
            if waited > each.patience and each.patience and each.job.job_id not in killed:
                say(f"job {each.job.job_id} has not ended in {waited:.0f} s: ending it as it is")
                cancel_job(each.job.job_id)
                killed.add(each.job.job_id)
            if waited > each.patience + _KILLS:
                number = each.job.job_id
                raise LaunchError(f"{run_dir}: SLURM has not ended job {number} yet; look with `squeue -j {number}`.")
        if told:
            time.sleep(pause)


def _say_how_it_stands(run_dir: Path, ran: bool, say: Callable[[str], None]) -> None:
    status = read_status(run_dir)
    outcome = read_outcome(run_dir)
    step = status.progress.checkpoint_step
    saved = "nothing is saved" if step is None else f"the newest checkpoint is that of step {step:,}"
    if outcome is not None and outcome.outcome == "done":
        say(f"{run_dir}: done before it was cancelled")
    elif ran:
        say(f"{run_dir}: cancelled; {saved}")
    else:
        say(f"{run_dir}: cancelled before it ran on; {saved}")
