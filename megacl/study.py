"""A study: arms x seeds, what they have in common trained once, ending in tables and a list of bars.

    megacl study studies/claims.yaml --out studies/claims [--jobs N]

    run_study("studies/claims.yaml", Path("studies/claims"))       # "done" or "stopped"

Everything that training would refuse is refused before the first run begins. The folder holds study.yaml (the study, in
full), runs/ (ordinary run directories), results.json, results.md and report.html. The same command goes on with what is
left; `megacl study DIR/study.yaml --out DIR` makes the results again from the folder alone. docs/studies.md is the
manual.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megacl import __version__
from megacl.config import RunConfig
from megacl.config_phase import nearest
from megacl.configfile import dump_tree, load_tree
from megacl.data.provide import provide_sources
from megacl.data.source import open_source
from megacl.engine import check_engine, device_here
from megacl.errors import ConfigError, LaunchError, MegaclError
from megacl.plan import check_batches, check_ranks, plan_data, schedule_of
from megacl.publish import alone_in, among_others_in, publish_text
from megacl.resume import shard_cache
from megacl.starting import foreign_format
from megacl.stopping import StopSignal, ToldToStop
from megacl.study_config import ReleaseConfig, StudyConfig, load_study, study_tree
from megacl.study_jobs import Jobs, Outcome
from megacl.study_page import render_study
from megacl.study_places import Place, find_places
from megacl.study_results import done_file, gather, is_done, results_json, results_markdown, summary
from megacl.study_tree import Node, Tree, before_it, build_tree, check_rates

_MANY_CHECKPOINTS = 50
"""How many a run may keep inside its phase without a word: releases at odd steps make it save at what divides all."""


def run_study(path: str, out: Path, *, jobs: int | None = None) -> Outcome:
    """Trains what is left of a study, and writes what came of it into `out`.

    jobs: how many runs at a time; None: one a core, one a GPU, or one a node of a SLURM allocation of several. Raises
    ConfigError, DataError, CheckpointError or LaunchError before anything is trained, RunFailedError where a run fails.
    """
    study = as_begun(load_study(path), out)
    tree = build_tree(study, out)
    left = [node for node in tree.nodes if not is_done(node)]
    with alone_in(out, "another study"), StopSignal() as stop:
        if left:
            places = find_places(jobs)
            if (planned := _plan(study, tree, out, stop)) is None:
                return "stopped"
            study, tree = planned
            left = [node for node in tree.nodes if not is_done(node)]
            at_once = min(len(places), len(left))
            _say(f"study {study.name}: {len(tree.nodes)} runs, {len(left)} to train, {at_once} at a time")
            done = set(tree.nodes) - set(left)
            made = _made_with(places)
            if Jobs(tree, places, lambda node: _mark_done(node, made), done).run(stop) == "stopped":
                return "stopped"
        _write_results(study, tree, out)
    return "done"


def run_part(path: str, out: Path, part: str) -> Outcome:
    """Does one part of a study, so that many processes share it (slurm/study.sbatch.j2): each may be done again.

    part: "plan", which makes what sources lack, checks all arms and writes study.yaml; then runs by their names, such
    as "seed-0/german-25-3fa9c1", at once as far as none goes on from another; then "results". Raises as `run_study`,
    and LaunchError where what comes before is not done.
    """
    study = as_begun(load_study(path), out)
    tree = build_tree(study, out)
    if part == "plan":
        with alone_in(out, "another study"), StopSignal() as stop:
            return "stopped" if _plan(study, tree, out, stop) is None else "done"
    if not (out / "study.yaml").is_file():
        raise LaunchError(f"{out} holds no plan of the study yet; --only plan makes it.")
    left = [node.name for node in tree.nodes if not is_done(node)]
    if part == "results":
        if left:
            raise LaunchError(f"{len(left)} runs of the study are not done, such as {left[0]}; train them first.")
        with alone_in(out, "another study"):
            _write_results(study, tree, out)
        return "done"
    by_name = {node.name: node for node in tree.nodes}
    if part not in by_name:
        raise ConfigError(f"--only is {part!r}, which is no run of the study{nearest(part, by_name)}")
    if part not in left:
        _say(f"run {part} is done")
        return "done"
    before = before_it(by_name[part])
    for node in before:
        if node.name in left:
            raise LaunchError(f"run {part} goes on from {node.name}, which is not done; train that first.")
    with among_others_in(out, "another study"), StopSignal() as stop:
        places = find_places(1)
        made = _made_with(places)
        alone = dataclasses.replace(tree, nodes=(*before, by_name[part]))
        return Jobs(alone, places, lambda node: _mark_done(node, made), set(before)).run(stop)


def _plan(study: StudyConfig, tree: Tree, out: Path, stop: StopSignal) -> tuple[StudyConfig, Tree] | None:
    """Makes what sources lack, and plans all; returns the study as it is pinned, with its runs. None: told to stop."""
    try:
        with stop.at_once():
            study = _prepare(study, tree)
            tree = build_tree(study, out)
            _check_plans(study, tree)
    except ToldToStop:
        _say("told to stop before training began; the same command goes on")
        return None
    publish_text(out / "study.yaml", dump_tree(study_tree(study)), "the study")
    return study, tree


def _write_results(study: StudyConfig, tree: Tree, out: Path) -> None:
    results = gather(study, tree)
    publish_text(out / "study.yaml", dump_tree(study_tree(study)), "the study")
    publish_text(out / "results.json", results_json(results), "the results")
    publish_text(out / "results.md", results_markdown(results), "the results")
    publish_text(out / "report.html", render_study(results), "the page")
    for line in summary(results):
        print(line)
    print(f"{out / 'report.html'}: open it in a browser")


def as_begun(study: StudyConfig, out: Path) -> StudyConfig:
    """The study with the generations that it began with in its folder. ConfigError where that holds another study."""
    if not (out / "study.yaml").is_file():
        return study
    before = load_tree([str(out / "study.yaml")])
    if before.get("name") != study.name:
        raise ConfigError(
            f"{out} holds the study {before.get('name')!r}, and this is {study.name!r}; give --out another folder."
        )
    begun = load_study(str(out / "study.yaml")).generations
    for path, generation in study.generations.items():
        if begun.get(path, generation) != generation:
            raise ConfigError(
                f"generations.{path} is {generation}, and the study in {out} began with {begun[path]}; give --out "
                "another folder."
            )
    return dataclasses.replace(study, generations={**begun, **study.generations})


def _prepare(study: StudyConfig, tree: Tree) -> StudyConfig:
    """Makes the sources that are not there yet; returns the study with the generations that it keeps to from now on.

    So arms are compared on the same data, whatever is prepared into a source's folder while the study goes on.
    """
    generations = dict(study.generations)
    for arm in _unfinished(tree):
        config = tree.whole[arm]
        with _in(f"arm {arm!r}"):
            check_engine(config.engine, device=device_here())
            check_ranks(config, 1)
            check_batches(config, 1)
            _check_start(config)
            provide_sources(config.tokenizer, config.sources, _say)
            for source in config.sources.values():
                if source.generation is None and source.path not in generations:
                    generations[source.path] = open_source(source.path, cache=shard_cache(config)).generation
    return dataclasses.replace(study, generations=generations)


def _check_start(config: RunConfig) -> None:
    """Raises ConfigError where the model to start from may be another one when the next run begins."""
    start = config.start_from
    if start is None or foreign_format(start) is not None:
        return
    if Path(start).is_dir() and not (Path(start) / "manifest.json").is_file():
        raise ConfigError(
            f"start_from is {start}, a run whose newest checkpoint may change while the study goes on; "
            f"name one of its steps, {start}@STEP."
        )


def _check_plans(study: StudyConfig, tree: Tree) -> None:
    """Plans each arm that is not done to its end. Raises what training would; says what is to be known."""
    said: set[str] = set()
    for arm in _unfinished(tree):
        config, ending = tree.whole[arm], study.arms[arm].release or study.arms[arm].merge
        with _in(f"arm {arm!r}"):
            lines, phases = plan_data(config)
            if ending is not None:
                record = phases[-1].record
                rate = schedule_of(config, config.phases[-1], record.start_lr, record.budget_steps)
                at = ending.at if isinstance(ending, ReleaseConfig) and ending.at else record.budget_steps
                with _in(f"its {'release' if isinstance(ending, ReleaseConfig) else 'merge'}"):
                    check_rates(config, ending, rate(min(at, record.budget_steps)))
        for line in [*lines, *(line for phase in phases for line in phase.notices)]:
            if line not in said:
                _say(f"warning: {line}")
            said.add(line)

    for node in tree.nodes:
        if node.ending is None and not is_done(node) and (kept := _kept(node.config)) > _MANY_CHECKPOINTS:
            every = node.config.checkpoint.keep_every or node.config.checkpoint.every_steps
            _say(f"warning: run {node.name} keeps {kept:,} checkpoints, one every {every} steps.")


def _kept(config: RunConfig) -> int:
    """How many checkpoints a run of one phase saves and keeps for good."""
    settings, steps = config.checkpoint, config.steps_of(config.phases[0])
    every = settings.keep_every if settings.keep_last else settings.every_steps
    return steps // every if every else 0


def _unfinished(tree: Tree) -> list[str]:
    """The arms of which a run is not done."""
    return list(dict.fromkeys(arm for (arm, _), path in tree.paths.items() if not all(map(is_done, path))))


@contextlib.contextmanager
def _in(where: str) -> Iterator[None]:
    """What is raised inside says where."""
    try:
        yield
    except MegaclError as error:
        raise type(error)(f"{where}: {error}") from None


def _mark_done(node: Node, made: dict[str, Any]) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = json.dumps({"key": node.key, "run": node.name, "finished": now, **made}, indent=1, ensure_ascii=False)
    publish_text(done_file(node), content + "\n", "that a run is done")


def _made_with(places: Sequence[Place]) -> dict[str, Any]:
    """The machine and the versions, for the page."""
    cores = len(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": str(cores), **os.environ, **places[0].environment}["OMP_NUM_THREADS"]
    return {
        "machine": f"{_processor()}, {cores} cores, {platform.system()} {platform.machine()}, {device_here()}",
        "threads": threads,
        "versions": {
            "megacl": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy")},
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
