"""The schema of a chain file: steps, each one command of megacl's, whose order follows from what they read and make.

    chain = load_chain("chain/demo.yaml")

docs/slurm.md is its manual. It is read like a run's configuration: YAML, frozen dataclasses, whatever is wrong in one
line, before anything is queued.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from megacl.config_phase import AnnealShape, Floor
from megacl.configfile import checked, load_tree
from megacl.errors import ConfigError
from megacl.merging import MergeShape
from megacl.model.config import STRICT

Text = Annotated[str, Field(min_length=1)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
KINDS = ("prepare", "train", "evaluate", "release", "convert", "report")


@dataclass(frozen=True, kw_only=True)
class PrepareStep:
    """`megacl prepare`, as an array of tasks and a job that merges what they made."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    inputs: Annotated[tuple[Text, ...], Field(min_length=1, description="files, folders or patterns of documents")]
    tokenizer: Text
    out: Text
    """The data folder."""
    tasks: Annotated[int, Field(ge=1, description="how many tasks share the files")] = 1
    at_once: Annotated[int, Field(ge=1, description="how many tasks run at a time")] | None = None
    options: tuple[Text, ...] = ()
    """Further options of `megacl prepare`, a word each: --field, content."""


@dataclass(frozen=True, kw_only=True)
class EvaluateStep:
    """`megacl evaluate`, its JSON into RUN/evaluations/."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run: Text
    """RUN@PHASE and the like; RUN alone, where the chain trains it, is every phase of it, each once it is trained."""
    data: tuple[Text, ...] = ()
    """Data folders; none: all that the model has seen."""
    seq_length: Annotated[int, Field(ge=1, description="tokens of context")] | None = None


@dataclass(frozen=True, kw_only=True)
class ReleaseStep:
    """`megacl release`: annealed or merged."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run: Text
    out: Text
    anneal: str | float | None = None
    merge: Text | None = None
    at: Annotated[int, Field(ge=0, description="the trunk's step")] | None = None
    shape: AnnealShape | MergeShape | None = None
    min_lr: Floor | None = None


@dataclass(frozen=True, kw_only=True)
class ConvertStep:
    """`megacl convert`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source: Text
    out: Text
    to: Literal["hf", "megacl"] = "hf"
    options: tuple[Text, ...] = ()
    """Further options of `megacl convert`, a word each: --dtype, bfloat16."""


@dataclass(frozen=True, kw_only=True)
class ReportStep:
    """`megacl report`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    runs: Annotated[tuple[Text, ...], Field(min_length=1, description="run directories")]
    out: Text


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """One step: exactly one of the commands, what it comes after beside what it reads, and what it is given."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    prepare: PrepareStep | None = None
    train: Annotated[tuple[Text, ...], Field(min_length=1, description="what stands behind `megacl train`")] | None = (
        None
    )
    """A job a phase."""
    evaluate: EvaluateStep | None = None
    release: ReleaseStep | None = None
    convert: ConvertStep | None = None
    report: ReportStep | None = None
    after: tuple[Text, ...] = ()
    """Steps, or STEP.PHASE, that must be done before, beside those whose outputs it reads."""
    cluster: dict[str, Any] = field(default_factory=dict)
    """Settings of the cluster file that differ for it."""

    @property
    def kind(self) -> str:
        """The one command that is given."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """All of a chain."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    folder: Text
    """Where chain.json, the scripts and the logs of steps without a run of their own go."""
    steps: dict[str, StepConfig]
    cluster: dict[str, Any] = field(default_factory=dict)
    """Settings of the cluster file that differ for all steps."""

    def check(self) -> None:
        """Raises ConfigError where a step is none, or its settings do not fit one another."""
        if not self.steps:
            raise ConfigError("steps is empty; a chain needs at least one.")
        for name, step in self.steps.items():
            if _NAME.fullmatch(name) is None:
                raise ConfigError(
                    f"steps.{name!r} is no name for a step; take letters, digits, '_' and '-', a letter or digit first."
                )
            given = [kind for kind in KINDS if getattr(step, kind) is not None]
            if len(given) != 1:
                found = f"has {' and '.join(given)}" if given else "says nothing to do"
                raise ConfigError(f"steps.{name} {found}; give it exactly one of {', '.join(KINDS)}.")
            if step.release is not None:
                _check_release(f"steps.{name}.release", step.release)


def _check_release(where: str, release: ReleaseStep) -> None:
    if (release.anneal is None) == (release.merge is None):
        raise ConfigError(f"{where} takes either anneal or merge; give one of them.")
    if release.anneal is not None and release.shape == "mean":
        raise ConfigError(f"{where}.shape is mean, which is no way to lower a rate; it goes with merge.")


def load_chain(path: str) -> ChainConfig:
    """The checked chain in a file, which is looked for like a run's configuration. Raises ConfigError in one line."""
    chain = checked(load_tree([path]), ChainConfig)
    chain.check()
    return chain
