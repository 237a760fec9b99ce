"""A study's arms and seeds as a tree of runs, each of them trained once.

    tree = build_tree(study, Path("studies/claims"))
    for node in tree.nodes:             # a node comes after the one that it goes on from
        print(node.name, node.command())
    tree.paths["replay-25", 0]          # the nodes of an arm under a seed, first to last

A node is one phase, or one release, in a run directory of its own; it goes on from its parent by `start_from`, so that
its samples, rates and, on one device, bits are those of one run with all the phases. Its key is a hash of all that its
outcome follows from: its resolved configuration, its seed, its parent's key. So arms share a node wherever they have
these in common, and a node whose settings change is another one, in another folder. The generations that the study
keeps to are those of all its runs, and not in the key.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import Any

from megacl.config import RunConfig
from megacl.config_checkpoint import CheckpointConfig
from megacl.config_phase import AnnealSchedule, PhaseConfig
from megacl.configfile import dump, from_tree, to_tree
from megacl.errors import ConfigError
from megacl.release import anneal_phase, final_rate
from megacl.release_merge import lowest_rate
from megacl.schedules import constant_part
from megacl.study_config import MergeConfig, ReleaseConfig, StudyConfig

_WATCHING = ("run_dir", "start_from", "checkpoint", "logging")
"""Settings of a run from which its outcome does not follow: parents have keys."""


@dataclass(frozen=True, eq=False)
class Node:
    """A run of a study."""

    key: str
    seed: int
    run_dir: Path
    parent: "Node | None"
    config: RunConfig
    """Of a phase: its run's. Of a release: that of the run which it is made from."""
    ending: ReleaseConfig | MergeConfig | None = None
    """What makes it a release instead of a phase."""

    @property
    def name(self) -> str:
        """The run directory below the study's `runs`: "seed-0/german-25-3fa9c1"."""
        return f"{self.run_dir.parent.name}/{self.run_dir.name}"

    @property
    def phase(self) -> PhaseConfig:
        """The phase that it trains, or at whose end it makes a release."""
        return self.config.phases[0]

    @property
    def tokens(self) -> int:
        """Tokens that it trains on, as configured: a phase may end early where its sources do."""
        if self.ending is None:
            return self.config.steps_of(self.phase) * self.config.tokens_per_step(self.phase)
        return int(self.ending.anneal) if isinstance(self.ending, ReleaseConfig) else 0

    @property
    def config_file(self) -> Path:
        """The configuration of a phase's run, as its command is given it."""
        return self.run_dir / "logs" / "config.yaml"

    @property
    def log_file(self) -> Path:
        """What its commands have said."""
        return self.run_dir / "logs" / "run.log"

    def command(self) -> list[str]:
        """The words of the command that makes it, its configuration having been written."""
        megacl = [sys.executable, "-m", "megacl"]
        if self.ending is None:
            return [*megacl, "train", str(self.config_file)]
        assert self.parent is not None
        release = [*megacl, "release", str(self.parent.run_dir), "--out", str(self.run_dir)]
        if isinstance(self.ending, MergeConfig):
            release += ["--merge", ",".join(map(str, merged_steps(self.config, self.ending)))]
        else:
            release += ["--anneal", str(int(self.ending.anneal))]
            release += [] if self.ending.at is None else ["--at", str(self.ending.at)]
        floor = [] if self.ending.min_lr is None else ["--min-lr", repr(self.ending.min_lr)]
        return [*release, "--shape", self.ending.shape, *floor]

    def config_text(self) -> str:
        """The configuration of a phase's run, as YAML."""
        return dump(self.config)


@dataclass(frozen=True)
class Tree:
    """All runs of a study."""

    nodes: tuple[Node, ...]
    """Each once, after its parent."""
    paths: Mapping[tuple[str, int], tuple[Node, ...]]
    """Of each arm under each of its seeds, first to last."""
    whole: Mapping[str, RunConfig]
    """Each arm's phases as one run, under its first seed: what a plan of the arm is made of."""

    @cached_property
    def tokens_below(self) -> Mapping[Node, int]:
        """Tokens on the longest way from a node, itself included, to an arm's end."""
        below: dict[Node, int] = {}
        for node in reversed(self.nodes):
            below[node] = node.tokens + below.get(node, 0)
            if node.parent is not None:
                below[node.parent] = max(below.get(node.parent, 0), below[node])
        return below


def before_it(node: Node) -> tuple[Node, ...]:
    """The runs that a run goes on from, first to last, itself left out."""
    return () if node.parent is None else (*before_it(node.parent), node.parent)


def build_tree(study: StudyConfig, out: Path) -> Tree:
    """The runs of a study whose folder is `out`. Raises ConfigError, naming the arm, for what training would refuse."""
    runs = out.resolve() / "runs"
    nodes: dict[str, Node] = {}
    paths: dict[tuple[str, int], tuple[Node, ...]] = {}
    whole: dict[str, RunConfig] = {}
    saving = _saving(study)
    for arm in study.arms:
        for seed in study.seeds_of(arm):
            try:
                one_run = _config(study, arm, seed, study.arms[arm].phases, run_dir=runs / f"arm-{arm}")
                whole.setdefault(arm, _pinned(study, one_run))
                paths[arm, seed] = tuple(_path(study, arm, seed, runs, saving, nodes))
            except ConfigError as error:
                raise ConfigError(f"arm {arm!r}: {error}") from None
    return Tree(tuple(nodes.values()), paths, whole)


def _path(
    study: StudyConfig, arm: str, seed: int, runs: Path, saving: Mapping[str, int], nodes: dict[str, Node]
) -> list[Node]:
    """The nodes of an arm, those of earlier arms where they are the same, the others added to `nodes`."""
    path: list[Node] = []
    phases = study.arms[arm].phases

    def add(config: RunConfig, label: str, ending: ReleaseConfig | MergeConfig | None, key: str) -> None:
        run_dir = runs / f"seed-{seed}" / f"{label}-{key[:6]}"
        if ending is None:
            config = _pinned(study, dataclasses.replace(config, run_dir=str(run_dir)))
        path.append(nodes.setdefault(key, Node(key, seed, run_dir, path[-1] if path else None, config, ending)))

    for index, name in enumerate(phases):
        config = _config(study, arm, seed, (name,), run_dir=runs / name, start_from=path[-1] if path else None)
        prefix = _prefix(study, arm, index + 1)
        if every := saving.get(prefix):
            checkpoint = CheckpointConfig(every_steps=every, keep_last=None)
            config = dataclasses.replace(config, checkpoint=checkpoint)
        settings = to_tree(config, defaults=False)  # a setting that is new in megacl leaves old runs what they are
        tree = {name: value for name, value in settings.items() if name not in _WATCHING}
        origin = path[-1].key if path else config.start_from
        key = _hash({"config": tree, "saved_every": every, "from": origin})
        add(config, name, None, key)
    ending = study.arms[arm].release or study.arms[arm].merge
    if ending is not None:
        _check_ending(path[-1].config, ending)
        label = phases[-1] + ("-merged" if isinstance(ending, MergeConfig) else "-released")
        add(path[-1].config, label, ending, _hash({"release": to_tree(ending, defaults=False), "from": path[-1].key}))
    return path


def _config(
    study: StudyConfig, arm: str, seed: int, phases: tuple[str, ...], *, run_dir: Path, start_from: Node | None = None
) -> RunConfig:
    tree = {**study.settings_of(arm), "run_dir": str(run_dir), "seed": seed}
    tree["phases"] = [to_tree(study.phases[name]) for name in phases]
    if start_from is not None:
        tree["start_from"] = f"{start_from.run_dir}@{start_from.phase.name}"
    return from_tree(tree)


def _pinned(study: StudyConfig, config: RunConfig) -> RunConfig:
    """The configuration with the generations that the study keeps to, for the sources that are given none."""
    sources = {
        name: dataclasses.replace(source, generation=source.generation or study.generations.get(source.path))
        for name, source in config.sources.items()
    }
    return dataclasses.replace(config, sources=sources)


def _saving(study: StudyConfig) -> dict[str, int]:
    """How often a run must save for the releases that are made of it, by the `_prefix` of its phase."""
    saving: dict[str, int] = {}
    for arm, settings in study.arms.items():
        every = settings.merge.every_steps if settings.merge else settings.release.at if settings.release else None
        if every is not None:
            prefix = _prefix(study, arm, len(settings.phases))
            saving[prefix] = gcd(saving.get(prefix, 0), every)
    return saving


def _prefix(study: StudyConfig, arm: str, length: int) -> str:
    """What an arm's first phases have in common with those of other arms: settings and names."""
    return _hash([study.settings_of(arm), study.arms[arm].phases[:length]])


def _check_ending(config: RunConfig, ending: ReleaseConfig | MergeConfig) -> None:
    """Raises ConfigError where a run has no checkpoints, or no constant rate, to make the release from."""
    phase, steps = config.phases[0], config.steps_of(config.phases[0])
    if isinstance(ending, MergeConfig):
        what, step = "merge begins at", merged_steps(config, ending)[0]
    else:
        what, step = "release is at", ending.at or steps
    if step > steps:
        raise ConfigError(f"{what} step {step} of phase {phase.name!r}, which has {steps}; give a step that it has.")
    constant = constant_part(phase.schedule, steps=steps, tokens_per_step=config.tokens_per_step(phase))
    if isinstance(ending, MergeConfig) and step in constant:
        what, step = "merge ends at", steps
    if step not in constant:
        where = f"holds one from {constant[0]} to {constant[-1]}" if constant else "holds no constant rate"
        raise ConfigError(
            f"{what} step {step} of phase {phase.name!r}, whose schedule, {phase.schedule.kind}, {where}; a release is "
            "made off a constant rate, so give the phase an infinite, constant or wsd schedule, or another step."
        )


def check_rates(config: RunConfig, ending: ReleaseConfig | MergeConfig, rate: float) -> None:
    """Raises ConfigError where `megacl release` would refuse an ending of a run's last phase.

    rate: that at which the phase stands where the release is made.
    """
    phase = config.phases[-1]
    if isinstance(ending, MergeConfig):
        lowest_rate(ending.shape, phase.schedule, rate, ending.min_lr)
        return
    lowest = final_rate(phase.schedule, rate, ending.min_lr)
    schedule = AnnealSchedule(kind="anneal", shape=ending.shape, min_lr=lowest)
    release = anneal_phase(phase, name="release", tokens=int(ending.anneal), schedule=schedule)
    from_tree(to_tree(dataclasses.replace(config, start_from="trunk", phases=(release,))))


def merged_steps(config: RunConfig, merge: MergeConfig) -> list[int]:
    """The steps of a run's only phase whose checkpoints are merged, oldest first, the phase's end last.

    Raises ConfigError where there are not so many.
    """
    last = config.steps_of(config.phases[0])
    first = last - (merge.last - 1) * merge.every_steps
    if first < 1 or last % merge.every_steps:
        raise ConfigError(
            f"merge is of {merge.last} checkpoints, {merge.every_steps} steps apart, up to the end of phase "
            f"{config.phases[0].name!r}, which has {last} steps; it must have a multiple of every_steps, and more than "
            f"{(merge.last - 1) * merge.every_steps}."
        )
    return list(range(first, last + 1, merge.every_steps))


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
