"""Submitting a run: check the plan, freeze what it needs, render its script, queue it, remember the job.

submission = submit_run(["my.yaml", "engine.kind=deepspeed"], cluster="h100x8")
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megacl.config import RunConfig
from megacl.config_cluster import ClusterConfig
from megacl.configfile import load_cluster
from megacl.errors import LaunchError
from megacl.publish import publish_text
from megacl.slurm.freeze import alone_with_jobs, freeze, new_job_folder, next_number
from megacl.slurm.jobs import jobs_in_queue
from megacl.slurm.queue import cancel_job, check_sbatch, submit_script
from megacl.slurm.render import Job, job_folder, render_script
from megacl.starting import load_run

_OF_CLUSTER = "cluster."


@dataclass(frozen=True)
class Submission:
    """A run and the cluster that it is meant for."""

    config: RunConfig
    cluster: ClusterConfig
    name: str

    @property
    def run_dir(self) -> Path:
        return Path(os.path.abspath(self.config.run_dir))

    def job(self, number: int) -> Job:
        """The job of a number: its script, its log, its words."""
        return Job(
            kind="train",
            name=self.name,
            run_dir=self.run_dir,
            number=number,
            workdir=Path.cwd(),
            python=python_of(self.cluster),
            command=("train", str(job_folder(self.run_dir, number) / "config.yaml")),
        )

    def next_job(self) -> Job:
        """The job that `submit` would make now."""
        return self.job(next_number(self.run_dir))


def python_of(cluster: ClusterConfig) -> str:
    """The Python that jobs run: the cluster file's, a container's own, or this one."""
    return cluster.python or ("python" if cluster.container else sys.executable)


def read_submission(arguments: Sequence[str], *, cluster: str, name: str | None = None) -> Submission:
    """What a command line asks for: files and overrides of the run, and among them cluster.KEY=VALUE.

    Raises ConfigError, and what `load_run` raises.
    """
    of_cluster = [each for each in arguments if each.startswith(_OF_CLUSTER) and "=" in each]
    config = load_run([each for each in arguments if each not in of_cluster])
    overrides = [each.removeprefix(_OF_CLUSTER) for each in of_cluster]
    return Submission(config, load_cluster(cluster, overrides), name or Path(config.run_dir).name or "megacl")


def submit(submission: Submission) -> tuple[Job, str]:
    """Freezes, renders and queues; returns the job and its id in SLURM. Where that fails nothing is left behind.

    Raises LaunchError where SLURM does not take the job, or has one of this run, and DataError where the disk refuses.
    """
    check_sbatch()
    run_dir = submission.run_dir
    with alone_with_jobs([run_dir]) as made:
        check_none_queued(run_dir)
        job = submission.job(new_job_folder(run_dir))
        made.append(job.folder)
        freeze(job.folder, submission.config, submission.cluster)
        job.script.write_text(render_script(job, submission.cluster), encoding="utf-8")
        job_id = submit_script(job.script)
        try:
            write_job(job, job_id)
        except BaseException:
            with contextlib.suppress(LaunchError):  # what went wrong before is what is to be said
                cancel_job(job_id)
            raise
    return job, job_id


def check_none_queued(run_dir: Path) -> None:
    """Raises LaunchError, naming the job, where one of the run's jobs waits or runs, be it submitted by hand."""
    for job in jobs_in_queue(run_dir):
        if job.ended:
            continue
        raise LaunchError(
            f"{run_dir}: its job {job.job_id} is {job.state.lower()}; `megacl cancel {run_dir}` ends it, if another "
            "one is to take its place."
        )


def write_job(job: Job, job_id: str, *, array: str | None = None, after: Sequence[str] = ()) -> None:
    """job.json: what was queued under which id (docs/formats.md)."""
    record = {
        "number": job.number,
        "kind": job.kind,
        "job_id": job_id,
        "array": array,
        "cluster": "cluster.yaml",
        "submitted": time.time(),
        "after": list(after),
        "script": str(job.script),
        "log": str(job.log_of(job_id)),
        "command": list(job.command),
    }
    publish_text(job.folder / "job.json", json.dumps(record, indent=1) + "\n", "the record of a job")
