"""A chain's or a study's jobs on the cluster, by its folder's chain.json: how they stand, and cancelling them."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megacl.errors import DataError, LaunchError
from megacl.log import table_text
from megacl.slurm.cancel import cancel_run
from megacl.slurm.graph import read_record
from megacl.slurm.queue import QueuedJob, cancel_job, find_jobs, user_here
from megacl.slurm.reasons import explain


def is_chain(folder: Path) -> bool:
    """Whether `megacl submit` has queued a chain or a study there."""
    return (folder / "chain.json").is_file()


def chain_tree(folder: Path) -> dict[str, Any]:
    """For JSON: the folder, and of each job its name, SLURM's number, the states of its tasks and how many are in each,
    why one waits, its log, and the run that it is of. Of one that was done before, or that SLURM has forgotten, there
    are no states.

    Raises DataError where chain.json cannot be read, LaunchError where SLURM cannot be asked.
    """
    jobs, known = _jobs(folder)
    told = []
    for name, job in jobs.items():
        found = known.get(job["job_id"], [])
        told.append(
            {
                "name": name,
                "job": job["job_id"],
                "done_before": job["job_id"] is None,
                "states": dict(_states(found)),
                "why": _why(found),
                "log": job["log"],
                "run_dir": job["run_dir"],
            }
        )
    return {"folder": str(folder), "jobs": told}


def chain_lines(tree: dict[str, Any]) -> Iterator[str]:
    """The same as a table: SLURM's number and how each job stands, the log of one that failed."""
    yield tree["folder"]
    rows = [[job["name"], job["job"] or "", _state(job)] for job in tree["jobs"]]
    yield from table_text(["job", "number", "state"], rows, align="lrl")
    for run_dir in dict.fromkeys(job["run_dir"] for job in tree["jobs"] if job["run_dir"] and job["job"]):
        yield f"megacl status {run_dir}    # its step, loss, speed"


def cancel_chain(folder: Path, say: Callable[[str], None]) -> None:
    """Takes all that waits out of the queue, the last job first, and ends what runs; what trains saves first.

    Raises LaunchError where a job belongs to somebody else, and as `cancel_run`.
    """
    jobs, known = _jobs(folder)
    living = {number: [each for each in found if not each.ended] for number, found in known.items()}
    saving: list[Path] = []
    for found in living.values():
        for each in found:
            if each.user != user_here():
                raise LaunchError(f"{folder}: job {each.job_id} is {each.user}'s; ask {each.user} to cancel it.")
    ended = 0
    for name, job in reversed(jobs.items()):
        found = living.get(job["job_id"], [])
        if not found:
            continue
        ended += 1
        if job["run_dir"] is not None and not all(each.waiting for each in found):
            saving.append(Path(job["run_dir"]))
            continue
        cancel_job(job["job_id"])
        say(f"{name}: job {job['job_id']} is cancelled")
    for run_dir in saving:
        cancel_run(run_dir, say)
    if not ended:
        say(f"{folder}: no job of it is in the queue")


def _jobs(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, list[QueuedJob]]]:
    """The jobs by their names, and what SLURM knows of each by its number; of an array, of each task."""
    record = read_record(folder)
    if record is None:
        raise DataError(f"{folder}: no chain.json lies there; name the folder of a chain or a study.")
    jobs: dict[str, dict[str, Any]] = record["jobs"]
    known: dict[str, list[QueuedJob]] = {}
    for found in find_jobs([job["job_id"] for job in jobs.values() if job["job_id"] is not None]):
        known.setdefault(found.job_id.partition("_")[0], []).append(found)
    return jobs, known


def _states(found: list[QueuedJob]) -> Counter[str]:
    return Counter(each.state.lower().replace("_", " ") for each in found)


def _why(found: list[QueuedJob]) -> str | None:
    """Why the first one that waits does."""
    waiting = next((each for each in found if each.waiting), None)
    return None if waiting is None else explain(waiting.reason).why


def _state(job: dict[str, Any]) -> str:
    """How a job stands, in words."""
    states: dict[str, int] = job["states"]
    if job["done_before"]:
        return "done before"
    if not states:
        return f"ended, and SLURM has forgotten how; {job['log']}"
    tasks = sum(states.values())
    words = ", ".join(f"{number} {state}" if tasks > 1 else state for state, number in states.items())
    if job["why"] is not None:
        return f"{words}: {job['why']}"
    return words if states.keys() <= {"completed", "running", "cancelled"} else f"{words}; {job['log']}"
