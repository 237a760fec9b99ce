"""A chain's steps as jobs, in an order in which they can be queued: pure but for looking at what is there already.

    jobs = plan_chain(load_chain("chain/demo.yaml"))
    for job in jobs:            # a job comes after those that it waits for
        print(job.name, job.command, job.after, job.makes)

A step reads what other steps make, by path: a run reads data folders, a release its trunk, a report its runs. So the
order follows from the paths, and `after` adds what they do not say. A job is left out where what it makes is there and
nothing that it waits for is made again.
"""

import dataclasses
import graphlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacl.checkpoint import named_checkpoint, read_state
from megacl.config import RunConfig
from megacl.config_phase import nearest
from megacl.configfile import merge
from megacl.data.generations import PREPARE_WORK
from megacl.data.tasks import read_command, read_task
from megacl.errors import CheckpointError, ConfigError
from megacl.slurm.chain_config import (
    ChainConfig,
    ConvertStep,
    EvaluateStep,
    PrepareStep,
    ReleaseStep,
    ReportStep,
    StepConfig,
)
from megacl.starting import load_run

_NEVER_OVER = ("release", "convert")
"""Kinds of jobs that make something where nothing may stand."""


@dataclass(frozen=True, kw_only=True)
class ChainJob:
    """One job of a chain."""

    name: str
    """STEP, or STEP.PHASE, STEP.tasks, STEP.merge where a step has several."""
    step: str
    kind: str
    """The template of its script."""
    command: tuple[str, ...]
    """The words behind `python -m megacl`; of a train job without its configuration, of an array without its task."""
    makes: str
    """The path of what is there once it is done, absolute: a folder, a file, or RUN@PHASE."""
    reads: tuple[str, ...]
    """The paths that it reads, absolute; only those that other jobs of the chain make matter."""
    after: tuple[str, ...] = ()
    """Names of the jobs that it waits for."""
    cluster: Mapping[str, Any]
    """Settings laid over the cluster file."""
    array: tuple[int, ...] = ()
    """The numbers of the array's tasks that are to do; empty: no array."""
    tasks: int = 1
    """How many tasks there are in all, done ones too."""
    at_once: int | None = None
    config: RunConfig | None = None
    """Of a train job: the run's."""
    run_dir: str | None = None
    """The run that it trains or releases, absolute; None: it has none of its own."""
    data_folder: Path = Path()
    """What a prepare's job makes or has a part in."""
    of: EvaluateStep | None = None
    """Of an evaluation: the step's settings."""

    @property
    def alone(self) -> bool:
        """Whether it is one process, or one a task of its array, on CPUs, instead of ranks."""
        return self.kind in ("prepare", "merge", "convert", "report")


def plan_chain(chain: ChainConfig) -> list[ChainJob]:
    """All jobs of a chain, each after those that it waits for, as near to the file's order as that allows.

    Raises ConfigError where steps are not known, wait for one another in a circle, or make the same thing, and what
    `load_run` raises for a train step.
    """
    jobs: dict[str, ChainJob] = {}
    for name, step in chain.steps.items():
        try:
            found = _jobs_of(name, step, chain)
        except ConfigError as error:
            raise ConfigError(f"steps.{name}: {error}") from None
        jobs |= {job.name: job for job in found}
    jobs = _phase_by_phase(jobs)
    makers = _makers(jobs.values())
    waiting = {name: _waits_for(job, chain, jobs, makers) for name, job in jobs.items()}
    return [dataclasses.replace(jobs[name], after=tuple(waiting[name])) for name in _in_order(waiting)]


def left_to_do(jobs: Sequence[ChainJob], before: Mapping[str, Sequence[str]]) -> list[ChainJob]:
    """The jobs of a chain that are not done, without the tasks of arrays that are.

    before: the commands of the chain's earlier submission by the names of their jobs; what is there counts as done
    where it was made like this. Raises ConfigError where a release or a conversion would be made over something else.
    """
    left: dict[str, ChainJob] = {}
    for job in jobs:
        same = tuple(before.get(job.name, ())) == job.command and not any(name in left for name in job.after)
        if job.kind in ("prepare", "merge"):
            if same and _is_prepared(job.data_folder):
                continue
            done = _tasks_done(job) if same and job.array else set()
            job = dataclasses.replace(job, array=tuple(number for number in job.array if number not in done))
            if done and not job.array:
                continue
        elif _is_done(job) and (same or job.kind == "train"):
            continue
        elif not same and job.kind in _NEVER_OVER and (there := _taken(job)):
            raise ConfigError(
                f"steps.{job.step}: {there} is there, and this step did not make it; name another out, or delete it."
            )
        left[job.name] = job
    return [dataclasses.replace(job, after=tuple(name for name in job.after if name in left)) for job in left.values()]


def _is_done(job: ChainJob) -> bool:
    """Whether what a job makes is there, whole."""
    if job.kind not in ("train", "release"):
        return os.path.lexists(job.makes)
    try:
        return read_state(named_checkpoint(job.makes)).phase_end
    except CheckpointError:
        return False


def _taken(job: ChainJob) -> str | None:
    """What stands already where a job would make something new, or None. Jobs' own folders in a run are nothing."""
    path = Path(job.makes)
    if job.kind == "release":
        path = path / "config.yaml"
    return str(path) if os.path.lexists(path) else None


def _is_prepared(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and not (folder / PREPARE_WORK).exists()


def _tasks_done(job: ChainJob) -> set[int]:
    """The tasks of the prepare under way in a data folder that have left their records."""
    work = job.data_folder / PREPARE_WORK
    command = read_command(work)
    if command is None or command.tasks != job.tasks:
        return set()
    return {task for task in job.array if read_task(command, work, task) is not None}


# ---------------------------------------------------------------------------------------------- a step's jobs


def _jobs_of(name: str, step: StepConfig, chain: ChainConfig) -> list[ChainJob]:
    """The jobs of a step; an evaluation of a whole run is one job yet."""
    common: dict[str, Any] = {"step": name, "cluster": merge(chain.cluster, step.cluster)}
    if step.prepare is not None:
        return _prepare_jobs(name, step.prepare, common)
    if step.train is not None:
        return _train_jobs(name, step.train, common)
    if step.evaluate is not None:
        return [_evaluate_job(name, step.evaluate, step.evaluate.run, common)]
    if step.release is not None:
        return [_release_job(name, step.release, common)]
    if step.convert is not None:
        return [_convert_job(name, step.convert, common)]
    assert step.report is not None
    return [_report_job(name, step.report, common)]


def _report_job(name: str, step: ReportStep, common: Mapping[str, Any]) -> ChainJob:
    words = ("report", *step.runs, "--out", step.out)
    reads = tuple(map(_absolute, step.runs))
    return ChainJob(name=name, kind="report", command=words, makes=_absolute(step.out), reads=reads, **common)


def _convert_job(name: str, step: ConvertStep, common: Mapping[str, Any]) -> ChainJob:
    words = ("convert", step.source, step.out, "--to", step.to, *step.options)
    makes, reads = _absolute(step.out), (_absolute(step.source),)
    return ChainJob(name=name, kind="convert", command=words, makes=makes, reads=reads, **common)


def _prepare_jobs(name: str, step: PrepareStep, common: Mapping[str, Any]) -> list[ChainJob]:
    words = ("prepare", *step.inputs, "--tokenizer", step.tokenizer, "--out", step.out, *step.options)
    reads = tuple(map(_absolute, (*step.inputs, step.tokenizer)))
    out = _absolute(step.out)
    whole = ChainJob(name=name, kind="prepare", command=words, makes=out, reads=reads, data_folder=Path(out), **common)
    if step.tasks == 1:
        return [whole]
    numbers = tuple(range(1, step.tasks + 1))
    array = dataclasses.replace(
        whole,
        name=f"{name}.tasks",
        makes=f"{out}/{PREPARE_WORK}",
        array=numbers,
        tasks=step.tasks,
        at_once=step.at_once,
    )
    return [
        array,
        dataclasses.replace(
            whole, name=f"{name}.merge", kind="merge", command=("data", "merge", step.out), reads=(array.makes,)
        ),
    ]


def _train_jobs(name: str, arguments: Sequence[str], common: Mapping[str, Any]) -> list[ChainJob]:
    config = load_run(arguments)
    run_dir = _absolute(config.run_dir)
    reads = [_absolute(source.path) for source in config.sources.values()]
    if config.start_from is not None:
        reads.append(_absolute(config.start_from))
    jobs: list[ChainJob] = []
    for phase in config.phases:
        jobs.append(
            ChainJob(
                name=f"{name}.{phase.name}",
                kind="train",
                command=("train", "--until-phase", phase.name),
                makes=f"{run_dir}@{phase.name}",
                reads=tuple(reads),
                config=config,
                run_dir=run_dir,
                **common,
            )
        )
        reads = [jobs[-1].makes]
    return jobs


def _evaluate_job(name: str, step: EvaluateStep, run: str, common: Mapping[str, Any]) -> ChainJob:
    folder, _, place = run.rpartition("@") if "@" in run and not os.path.isdir(run) else (run, "", "newest")
    makes = f"{_absolute(folder)}/evaluations/{place}.json"
    words = ["evaluate", run, "--out", makes]
    for data in step.data:
        words += ["--data", data]
    words += ["--seq-length", str(step.seq_length)] if step.seq_length else []
    reads = (_absolute(run), *map(_absolute, step.data))
    return ChainJob(name=name, kind="evaluate", command=tuple(words), makes=makes, reads=reads, of=step, **common)


def _release_job(name: str, step: ReleaseStep, common: Mapping[str, Any]) -> ChainJob:
    words = ["release", step.run, "--out", step.out]
    given = {"anneal": step.anneal, "merge": step.merge, "at": step.at, "shape": step.shape, "min-lr": step.min_lr}
    for option, value in given.items():
        if value is not None:
            words += [f"--{option}", repr(value) if isinstance(value, float) else str(value)]
    out = _absolute(step.out)
    return ChainJob(
        name=name, kind="release", command=tuple(words), makes=out, reads=(_absolute(step.run),), run_dir=out, **common
    )


def _phase_by_phase(jobs: Mapping[str, ChainJob]) -> dict[str, ChainJob]:
    """The jobs with an evaluation of a run that the chain trains made one a phase."""
    trained: dict[str, list[ChainJob]] = {}
    for job in jobs.values():
        if job.kind == "train":
            trained.setdefault(str(job.run_dir), []).append(job)
    found: dict[str, ChainJob] = {}
    for job in jobs.values():
        phases = trained.get(job.reads[0], []) if job.of is not None else []
        if job.of is None or not phases:
            found[job.name] = job
            continue
        for phase in phases:
            _, _, place = phase.makes.rpartition("@")
            common = {"step": job.step, "cluster": job.cluster}
            each = _evaluate_job(f"{job.name}.{place}", job.of, f"{job.of.run}@{place}", common)
            found[each.name] = each
    return found


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


# ---------------------------------------------------------------------------------------------- their order


def _makers(jobs: Iterable[ChainJob]) -> dict[str, str]:
    """The name of the job that makes each path. A run is made by its last phase's. ConfigError where two make one."""
    makers: dict[str, ChainJob] = {}
    for job in jobs:
        for path in (job.makes, job.run_dir):
            if path is None:
                continue
            other = makers.get(path)
            if other is not None and not (path == job.run_dir and other.step == job.step):
                raise ConfigError(f"steps.{other.step} and steps.{job.step} both make {path}; give one another place.")
            makers[path] = job
    return {path: job.name for path, job in makers.items()}


def _waits_for(job: ChainJob, chain: ChainConfig, jobs: Mapping[str, ChainJob], makers: Mapping[str, str]) -> list[str]:
    """The jobs that must be done before this one."""
    found = [maker for path in job.reads if (maker := _maker_of(path, makers)) is not None and maker != job.name]
    inside = {each.name for each in jobs.values() if each.step == job.step}
    if not inside.intersection(found):  # the first of its step's
        for wanted in chain.steps[job.step].after:
            if wanted in jobs:
                found.append(wanted)
            elif wanted in chain.steps:
                found += _last_of(wanted, jobs)
            else:
                known = [*chain.steps, *jobs]
                raise ConfigError(f"steps.{job.step}.after names {wanted!r}, which is no step{nearest(wanted, known)}")
    return list(dict.fromkeys(found))


def _maker_of(path: str, makers: Mapping[str, str]) -> str | None:
    """Who makes a path: itself, RUN for RUN@STEP, or what it lies in."""
    run, at, _ = path.rpartition("@")
    for each in (path, *((run,) if at else ()), *map(str, Path(path).parents)):
        if each in makers:
            return makers[each]
    return None


def _last_of(step: str, jobs: Mapping[str, ChainJob]) -> list[str]:
    """The jobs of a step at whose end it is done: of a run its last phase's, of a prepare the merge."""
    names = [job.name for job in jobs.values() if job.step == step]
    return names if jobs[names[0]].kind == "evaluate" else names[-1:]


def _in_order(waiting: Mapping[str, Sequence[str]]) -> list[str]:
    """The jobs' names, each after those that it waits for. ConfigError, naming it, where there is a circle."""
    try:
        graphlib.TopologicalSorter(waiting).prepare()
    except graphlib.CycleError as error:
        # each of the list is waited for by the next one
        circle = " waits for ".join(reversed(error.args[1]))
        raise ConfigError(f"these steps wait for one another: {circle}; take one `after` out.") from None
    order: list[str] = []
    while len(order) < len(waiting):
        order += [next(n for n, first in waiting.items() if n not in order and all(each in order for each in first))]
    return order
