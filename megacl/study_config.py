"""The schema of a study: arms, each a list of phases, trained under several seeds, and the bars that they are held to.

    study = load_study("studies/claims.yaml")

docs/studies.md is its manual. A study is read like a run's configuration: YAML, frozen dataclasses, whatever is wrong
in one line, before anything is trained. `base` is a run's configuration without run_dir, phases and seed, which the
study sets; it may be a list of files and mappings, merged left to right.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from megacl.config_phase import AnnealShape, Floor, PhaseConfig, nearest
from megacl.configfile import checked, load_tree, merge, to_tree
from megacl.errors import ConfigError
from megacl.merging import MergeShape
from megacl.model.config import STRICT
from megacl.study_words import Bar, parse_bar

_SET_BY_THE_STUDY = ("run_dir", "phases", "seed")


@dataclass(frozen=True, kw_only=True)
class ReleaseConfig:
    """An arm that ends in an anneal off its last phase, as `megacl release --anneal` makes it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    anneal: Annotated[float, Field(gt=0, description="how many tokens the anneal takes")]
    shape: AnnealShape = "linear"
    min_lr: Floor | None = None
    at: Annotated[int, Field(ge=1, description="the step of the last phase's run to branch off at")] | None = None
    """Null: where the last phase ends. The phase saves a checkpoint there because of this."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """An arm that ends in a weighted mean of its last phase's checkpoints, as `megacl release --merge` makes it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    last: Annotated[int, Field(ge=2, description="how many checkpoints to merge")]
    every_steps: Annotated[int, Field(ge=1, description="optimizer steps between two of them")]
    """The last one is the phase's end. The phase saves them because of this."""
    shape: MergeShape = "linear"
    min_lr: Floor | None = None
    """Where the decay that the weights imitate ends; as in an anneal if null."""


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One way of training, whose outcome is compared with the other arms'."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    phases: tuple[str, ...]
    """Names out of the study's phases, in order. What arms have in common from the beginning on is trained once."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of the run that differ from `base` in this arm, merged over it."""
    seeds: tuple[int, ...] | None = None
    """Null: all of the study's."""
    release: ReleaseConfig | None = None
    merge: MergeConfig | None = None


@dataclass(frozen=True, kw_only=True)
class BarConfig:
    """A claim, and the comparison that must hold for it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    claim: str
    holds: str
    """A comparison in the words of study_words.py."""
    control: bool = False
    """A control is one that must not hold."""
    reported: str | None = None
    """What the source of the claim found."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """All of a study. `to_tree` of it is itself a study file, with `base` merged into one mapping."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Annotated[str, Field(min_length=1, description="the study's name")]
    question: str | None = None
    """What it is to find out, for its page."""
    budget: str | None = None
    """What it takes, in words, for its page."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63, description="a seed of weights and order")], ...] = (0,)
    base: dict[str, Any]
    phases: dict[str, PhaseConfig]
    """By name. Each is a phase of a run's configuration, without its name."""
    arms: dict[str, ArmConfig]
    bars: tuple[BarConfig, ...] = ()
    generations: dict[str, Annotated[int, Field(ge=1, description="a state of a source's manifest")]] = field(
        default_factory=dict
    )
    """By a source's path, that of every run for which `sources` gives none. The study's folder holds those that were
    the newest when the study began."""

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds under which an arm is trained, in the study's order."""
        chosen = self.arms[arm].seeds
        return self.seeds if chosen is None else tuple(seed for seed in self.seeds if seed in chosen)

    def parsed_bars(self) -> list[Bar]:
        """The bars' comparisons. Raises ConfigError, naming the bar, where one is none."""
        return [parse_bar(bar.holds, f"bars[{index}].holds") for index, bar in enumerate(self.bars)]

    def settings_of(self, arm: str) -> dict[str, Any]:
        """The run's settings of an arm, as plain data without run_dir, phases and seed."""
        settings: dict[str, Any] = merge(self.base, self.arms[arm].set)
        return settings

    def check(self) -> None:
        """Raises ConfigError where settings do not fit one another."""
        _check_seeds("seeds", self.seeds)
        for where, settings in {"base": self.base, **{f"arms.{n}.set": a.set for n, a in self.arms.items()}}.items():
            for key in _SET_BY_THE_STUDY:
                if key in settings:
                    raise ConfigError(f"{where}.{key} is given, which the study sets for each run; take it out.")
        if not self.arms:
            raise ConfigError("arms is empty; a study needs at least one, with the list of its phases.")
        for name, arm in self.arms.items():
            self._check_arm(f"arms.{name}", arm)
        used = {phase for arm in self.arms.values() for phase in arm.phases}
        for name in self.phases:
            if name not in used:
                raise ConfigError(f"phases.{name} is in no arm; name it in one, or take it out.")
        self._check_bars()

    def _check_arm(self, where: str, arm: ArmConfig) -> None:
        if not arm.phases:
            raise ConfigError(f"{where}.phases is empty; name at least one of the study's phases.")
        for index, phase in enumerate(arm.phases):
            if phase not in self.phases:
                raise ConfigError(
                    f"{where}.phases[{index}] is {phase!r}, which is not in phases{nearest(phase, self.phases)}"
                )
            if phase in arm.phases[:index]:
                raise ConfigError(
                    f"{where}.phases names {phase!r} twice, and a model's phases have names of their own; "
                    "give the second one another name in phases."
                )
        if arm.seeds is not None:
            _check_seeds(f"{where}.seeds", arm.seeds)
            for seed in arm.seeds:
                if seed not in self.seeds:
                    raise ConfigError(f"{where}.seeds names {seed}, which is not in the study's seeds; add it there.")
        if arm.release and arm.merge:
            raise ConfigError(f"{where} has both release and merge; make two arms of it.")

    def _check_bars(self) -> None:
        for index, (config, bar) in enumerate(zip(self.bars, self.parsed_bars(), strict=True)):
            where = f"bars[{index}] ({config.claim})"
            for arm in bar.arms:
                if arm not in self.arms:
                    raise ConfigError(f"{where} names arm {arm!r}, which is not in arms{nearest(arm, self.arms)}")
            sources = {name for arm in bar.arms for name in _mapping(self.settings_of(arm).get("sources"))}
            for source in bar.sources:
                if source not in sources:
                    raise ConfigError(
                        f"{where} names source {source!r}, which is not in base.sources{nearest(source, sources)}"
                    )
            if not set.intersection(*(set(self.seeds_of(arm)) for arm in bar.arms)):
                raise ConfigError(f"{where} compares arms that have no seed in common; give them one.")


def load_study(path: str) -> StudyConfig:
    """The checked study in a file, which is looked for like a run's configuration. Raises ConfigError in one line."""
    tree = load_tree([path])
    if "base" in tree:
        tree["base"] = _merged_base(tree["base"])
    phases = tree.get("phases")
    if isinstance(phases, dict):
        for name, phase in phases.items():
            if isinstance(phase, dict) and "name" in phase:
                raise ConfigError(f"phases.{name}.name is given; a phase of a study has its key as its name.")
        tree["phases"] = {
            name: {"name": name, **phase} if isinstance(phase, dict) else phase for name, phase in phases.items()
        }
    study = checked(tree, StudyConfig)
    study.check()
    return study


def study_tree(study: StudyConfig) -> dict[str, Any]:
    """The study as plain data that `load_study` reads as the same, without what files `base` was merged from."""
    tree = to_tree(study)
    tree["phases"] = {name: {k: v for k, v in phase.items() if k != "name"} for name, phase in tree["phases"].items()}
    return tree


def _merged_base(base: Any) -> Any:
    """base as one mapping: as it is, or a list of files and mappings merged left to right."""
    if not isinstance(base, list):
        return base
    merged: Any = {}
    for index, part in enumerate(base):
        if not isinstance(part, str | dict):
            raise ConfigError(f"base[{index}] is {part!r}; it must be a file's name or a mapping of settings.")
        merged = merge(merged, load_tree([part]) if isinstance(part, str) else part)
    return merged


def _check_seeds(where: str, seeds: Iterable[int]) -> None:
    seen: set[int] = set()
    for seed in seeds:
        if seed in seen:
            raise ConfigError(f"{where} names {seed} twice; a seed is trained once.")
        seen.add(seed)
    if not seen:
        raise ConfigError(f"{where} is empty; name at least one.")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
