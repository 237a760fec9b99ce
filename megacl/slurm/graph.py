"""Several jobs that wait for one another: all are queued, or none, and FOLDER/chain.json says under which ids.

    queue_all(folder, parts, Record(...))

A job waits for others by afterok with --kill-on-invalid-dep: where one fails or is cancelled SLURM cancels those that
wait for it, and theirs; one that is requeued keeps them waiting. docs/formats.md has the form of chain.json.
"""

import contextlib
import dataclasses
import json
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megacl.config import RunConfig
from megacl.config_cluster import ClusterConfig
from megacl.errors import DataError, LaunchError
from megacl.log import table_text
from megacl.publish import publish_text
from megacl.slurm.freeze import alone_with_jobs, freeze, new_job_folder, next_number
from megacl.slurm.queue import cancel_job, check_sbatch, find_jobs, submit_script, user_here
from megacl.slurm.render import Job, render_script
from megacl.slurm.submit import check_none_queued, python_of, write_job

_FILE = "chain.json"
_FORMAT, _VERSION = "megacl-chain", 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of several jobs, before it has a folder and an id."""

    name: str
    kind: str
    """The template of its script."""
    command: tuple[str, ...]
    """The words behind `python -m megacl`, without the name of the frozen file."""
    after: tuple[str, ...] = ()
    """Names of the parts that must be done before it."""
    cluster: ClusterConfig
    home: Path
    """The folder whose jobs/ and logs/ it has: its run's, or that of all."""
    run_dir: Path | None = None
    """The run that it trains."""
    frozen: str | None = None
    """The file in the job's folder that is the first word behind the verb: config.yaml, study.yaml."""
    config: RunConfig | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    """Further files to freeze, text by name."""
    alone: bool = False
    gpus: bool = True
    array: str | None = None
    tasks: int = 1
    runs: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        """How much it runs on, in words: 2 x 8 ranks, 1 process, array 1-8, 2 at a time."""
        if self.array is not None:
            numbers, _, at_once = self.array.partition("%")
            return f"array {numbers}" + (f", {at_once} at a time" if at_once else "")
        return "1 process" if self.alone else f"{self.cluster.nodes} x {self.cluster.ranks_per_node} ranks"

    def job(self, number: int) -> Job:
        """Its job, in the folder of a number."""
        job = Job(
            kind=self.kind,
            name=self.name,
            run_dir=self.home,
            number=number,
            workdir=Path.cwd(),
            python=python_of(self.cluster),
            command=self.command,
            alone=self.alone,
            gpus=self.gpus,
            array=self.array,
            tasks=self.tasks,
            runs=self.runs,
        )
        if self.frozen is None:
            return job
        verb, *rest = self.command
        return dataclasses.replace(job, command=(verb, str(job.folder / self.frozen), *rest))


@dataclass(frozen=True, kw_only=True)
class Record:
    """What chain.json says of all jobs, beside their ids."""

    kind: str
    """ "chain" or "study"."""
    file: Path
    """What was submitted."""
    cluster: str
    """The cluster's name, as given."""
    parts: Sequence[Part]
    """All of them, those too that were done before and are not queued."""


@dataclass(frozen=True)
class AskedJobs:
    """Jobs that wait for one another, as they would be queued."""

    folder: Path
    """Where chain.json goes, and the jobs that have no run of their own."""
    left: tuple[Part, ...]
    """What is to do, each after those that it waits for."""
    record: Record

    def scripts(self) -> Iterator[str]:
        """The scripts, as they would be if they were queued now. Raises ConfigError as `render_script`."""
        numbers: Counter[Path] = Counter()
        for part in self.left:
            number = next_number(part.home) + numbers[part.home]
            numbers[part.home] += 1
            yield render_script(part.job(number), part.cluster)

    def lines(self) -> Iterator[str]:
        """A table of all jobs: on how much each runs, what it waits for, its command."""
        left = {part.name: part for part in self.left}
        rows = []
        for part in self.record.parts:
            found = left.get(part.name)
            size, after = (found.size, ", ".join(found.after)) if found else ("done already", "")
            rows.append([part.name, size, after, shlex.join(part.command)])
        yield from table_text(["job", "on", "after", "command"], rows, align="llll")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What an earlier submission has left in a folder, or None. Raises DataError where it cannot be read."""
    path = folder / _FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (found["format"], found["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"made in format {found['format']} {found['version']}, which is not known here")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; restore it, or delete it and submit anew.") from None
    return found


def check_nothing_queued(folder: Path) -> None:
    """Raises LaunchError, naming one, where jobs of an earlier submission in the folder wait or run."""
    record = read_record(folder) or {"jobs": {}}
    ids = {job["job_id"]: name for name, job in record["jobs"].items() if job["job_id"] is not None}
    # SLURM counts on from 1 again some day, so that another user's job may have the number of one of these.
    left = [job for job in find_jobs(ids) if job.user == user_here() and not job.ended]
    if left:
        job = min(left, key=lambda job: job.waiting)
        number = job.job_id.partition("_")[0]
        raise LaunchError(
            f"{folder}: its job {ids[number]} ({number}) is {job.state.lower()}; wait for it, or "
            f"`megacl cancel {folder}` ends all that is left of it."
        )


def queue_all(folder: Path, parts: Sequence[Part], record: Record) -> dict[str, tuple[Job, str]]:
    """Freezes, renders and queues parts in this order, and returns each one's job and its id in SLURM, by name.

    Where one fails the ones that are queued are cancelled, and nothing is left behind. Raises LaunchError where SLURM
    does not take one, or has jobs of this folder or of one of the runs, and DataError where the disk refuses.
    """
    check_sbatch()
    homes = list(dict.fromkeys([folder, *(part.home for part in parts)]))
    with alone_with_jobs(homes) as made:
        check_nothing_queued(folder)
        for run_dir in dict.fromkeys(part.run_dir for part in parts if part.run_dir is not None):
            check_none_queued(run_dir)
        jobs: dict[str, Job] = {}
        for part in parts:
            jobs[part.name] = job = part.job(new_job_folder(part.home))
            made.append(job.folder)
            freeze(job.folder, part.config, part.cluster)
            for name, text in part.files.items():
                publish_text(job.folder / name, text, "what a job runs")
            job.script.write_text(render_script(job, part.cluster), encoding="utf-8")
        ids = _submit(parts, jobs)
        try:
            for part in parts:
                write_job(jobs[part.name], ids[part.name], array=part.array, after=[ids[name] for name in part.after])
            publish_text(folder / _FILE, _record_text(record, parts, jobs, ids), "the record of the jobs")
        except BaseException:
            _cancel(ids)
            raise
    return {name: (job, ids[name]) for name, job in jobs.items()}


def _submit(parts: Sequence[Part], jobs: Mapping[str, Job]) -> dict[str, str]:
    """The ids by the parts' names. Where SLURM does not take one, those before it are cancelled."""
    ids: dict[str, str] = {}
    try:
        for part in parts:
            first = ":".join(ids[name] for name in part.after)
            options = [f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes"] if first else []
            ids[part.name] = submit_script(jobs[part.name].script, options=options)
    except BaseException as error:
        _cancel(ids)
        if isinstance(error, LaunchError) and ids:
            raise LaunchError(f"{error} The {len(ids)} jobs that were queued before it are cancelled.") from None
        raise
    return ids


def _cancel(ids: Mapping[str, str]) -> None:
    """Takes back what was queued, the last one first, so that none begins meanwhile because another one is gone."""
    for job_id in reversed(list(ids.values())):
        with contextlib.suppress(LaunchError):  # what went wrong before is what is to be said
            cancel_job(job_id)


def _record_text(record: Record, queued: Sequence[Part], jobs: Mapping[str, Job], ids: Mapping[str, str]) -> str:
    arrays = {part.name: part.array for part in queued}

    def entry(part: Part) -> dict[str, Any]:
        job = jobs.get(part.name)
        return {
            "kind": part.kind,
            "job_id": ids.get(part.name),
            "array": arrays.get(part.name),
            "after": list(part.after),
            "run_dir": str(part.run_dir) if part.run_dir else None,
            "folder": str(job.folder) if job else None,
            "log": str(job.log_of(ids[part.name])) if job else None,
            "command": list(part.command),
        }

    tree = {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": record.kind,
        "file": str(record.file),
        "cluster": record.cluster,
        "submitted": time.time(),
        "jobs": {part.name: entry(part) for part in record.parts},
    }
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
