"""Submitting a chain: its jobs checked against the cluster, those that are done left out, the others queued at once.

asked = read_chain("chain/trunk.yaml", cluster="h100x8")
print(*asked.lines(), sep="\n")
queue_all(asked.folder, asked.left, asked.record)
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megacl.configfile import load_cluster
from megacl.errors import DataError, MegaclError
from megacl.slurm.chain import ChainJob, left_to_do, plan_chain
from megacl.slurm.chain_config import load_chain
from megacl.slurm.check import check_fit, plan_lines
from megacl.slurm.graph import AskedJobs, Part, Record, read_record


def read_chain(path: str, *, cluster: str, overrides: Sequence[str] = ()) -> AskedJobs:
    """A chain file's jobs on a cluster, checked. overrides: key=value of the cluster file, for every step.

    Raises ConfigError, LaunchError or DataError, naming the step, where one of them could not do its work: what
    `plan_chain` and `left_to_do` find, ranks that do not fit a run, a model that does not fit, data that nobody makes.
    """
    chain = load_chain(path)
    folder = Path(os.path.abspath(chain.folder))
    jobs = plan_chain(chain)
    before = {name: job["command"] for name, job in (read_record(folder) or {"jobs": {}})["jobs"].items()}
    left = left_to_do(jobs, before)
    everything = {job.name: _part(job, folder, cluster, overrides) for job in jobs}
    configs = {job.run_dir: job for job in jobs if job.kind == "train"}
    for job in left:
        try:
            _check(job, everything[job.name], jobs, configs)
        except MegaclError as error:
            raise type(error)(f"steps.{job.step}: {error}") from None
    parts = tuple(dataclasses.replace(everything[job.name], after=job.after, array=_array(job)) for job in left)
    file = Path(os.path.abspath(path))
    return AskedJobs(folder, parts, Record(kind="chain", file=file, cluster=cluster, parts=[*everything.values()]))


def _part(job: ChainJob, folder: Path, cluster: str, overrides: Sequence[str]) -> Part:
    settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in _flat(job.cluster)]
    run_dir = Path(job.run_dir) if job.run_dir is not None else None
    return Part(
        name=job.name,
        kind=job.kind,
        command=job.command,
        after=job.after,
        cluster=load_cluster(cluster, [*settings, *overrides]),
        home=run_dir or folder,
        run_dir=run_dir,
        frozen="config.yaml" if job.kind == "train" else None,
        config=job.config,
        alone=job.alone,
        gpus=not job.alone,
        array=_array(job),
        tasks=job.tasks,
    )


def _array(job: ChainJob) -> str | None:
    """SLURM's words for an array's tasks: 1-8%2, or 3,5 where the others are done."""
    if not job.array:
        return None
    numbers = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in _stretches(job.array))
    return numbers + (f"%{job.at_once}" if job.at_once else "")


def _stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def _flat(settings: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """Settings as (section.key, value): a mapping's own, so that it is laid over the cluster file's, key by key."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _check(job: ChainJob, part: Part, jobs: Sequence[ChainJob], trained: Mapping[str | None, ChainJob]) -> None:
    """Raises what a job would raise at its start, as far as that can be known before the jobs before it have run."""
    if job.config is None:
        run = job.reads[0].rpartition("@")[0] or job.reads[0]
        config = trained[run].config if run in trained and not job.alone else None
        if config is not None:
            check_fit(config, part.cluster)
        return
    if any(other.step != job.step for other in jobs if other.name in job.after):
        check_fit(job.config, part.cluster)
    elif not job.after:
        list(plan_lines(job.config, part.cluster))
    made = {str(other.data_folder) for other in jobs if other.kind in ("prepare", "merge")}
    for name, source in job.config.sources.items():
        path = os.path.abspath(source.path)
        there = "://" in source.path or source.documents or os.path.exists(f"{path}/manifest.json")
        if not there and path not in made:
            raise DataError(
                f"sources.{name} is {source.path}, where no data is, and no step prepares it; add one, or correct it."
            )
