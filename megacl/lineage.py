"""What a model has ever seen, phase by phase: enough to recompute every sample of its history.

A lineage is a file, lineage.json, in each checkpoint and in the run directory. It holds the phases of earlier runs that
the model went through first. Since order is arithmetic, a phase is described by its sources' fingerprints, the seed,
the sequence length, the integer weights with the places where they change, by how far it went and what it passed over;
nothing else is stored about the order of data.
"""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megacl.errors import CheckpointError
from megacl.model.config import STRICT
from megacl.publish import publish_text

_FORMAT, _VERSION = "megacl-lineage", 3

Ranges = tuple[tuple[int, int], ...]
"""[first, end) of each, ascending, none empty, with something left out between two of them."""


@dataclass(frozen=True, kw_only=True)
class MixtureLine:
    """Where a stretch's weights are on their way to: the new weights' part grows from 0 at `start` to 1 at `end`."""

    weights: tuple[int, ...]
    start: int
    """The number of the sample with which the way begins: before the stretch where a source ran out on the way."""
    end: int


@dataclass(frozen=True, kw_only=True)
class MixturePiece:
    """A stretch of a mixture: from its first sample to the next stretch's, by one pattern or from one to another."""

    first: int
    """The number of its first sample among those that the mixture deals out: a phase's own, or its replayed ones."""
    weights: tuple[int, ...]
    """Integers, aligned with what is mixed: a sample is one of it in `weight` of every sum of weights."""
    line: MixtureLine | None = None


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """One source of a phase, and which of its draws the phase took: [first, first + samples)."""

    name: str
    path: str
    generation: int
    since: int = 0
    """What this earlier generation held was left out; 0: nothing was."""
    window: int | None = None
    """Shards in a window of the order in which it was read; None: a permutation of all sequences."""
    fingerprint: str
    train_tokens: int
    first: int
    samples: int = 0
    share: float = 0.0
    """Its part of the phase's own samples (where it is replayed by name, of the replayed ones), as planned."""
    runs_out: int | None = None
    """The phase's sample that would be the first to read it again, where the phase does not; null: none would."""
    tokens: int = 0
    """Tokens of these draws that the model has learned from, less than they hold where samples were passed over."""
    tokens_before: int = 0
    """Tokens that it had learned from the same folder in earlier phases, in any cut, order and generation."""
    epochs: float = 0.0
    """tokens_before + tokens, as a part of what there is to read: above 1, something was learned from twice."""


@dataclass(frozen=True, kw_only=True)
class ReplayedPhase:
    """An earlier phase that a phase replays, and which draws from it the phase took: [first, first + samples).

    A phase that has learned from P tokens of its own has P // seq_length draws a round, seq_length being that of the
    phase that replays it.
    """

    phase: str
    first: int
    runs_out: int | None = None
    """The phase's sample that would be the first to replay it beyond max_times; null: none would."""
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class ReplayRecord:
    """What a phase replayed: earlier phases, or named sources where the model's own history is unknown."""

    share: str
    """An exact fraction, "1/4"."""
    policy: Literal["original", "uniform", "power_law", "exponential", "latest"] = "original"
    mixture: tuple[MixturePiece, ...]
    """Over `from`, or over `from_sources`."""
    samples: int = 0
    from_: Annotated[tuple[ReplayedPhase, ...], Field(alias="from")] = ()
    from_sources: tuple[SourceRecord, ...] = ()

    @property
    def fraction(self) -> Fraction:
        """The share as an exact fraction."""
        return Fraction(self.share)


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """One phase: what it read, in which order, how far it went, and under which schedule."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run: str
    """The run directory's name."""
    name: str
    order: Literal["v1"]
    seed: int
    seq_length: int
    packing: Literal["cut", "best_fit"] = "cut"
    """How its sequences were made; padding counts as tokens wherever tokens are counted."""
    global_batch_size: int
    budget_samples: int
    samples: int = 0
    """Samples seen, replayed ones included; budget_samples once the phase is over."""
    passed_over: Ranges = ()
    """Those of the samples seen that the model has not learned from: their update was skipped, or undone by going back
    to a checkpoint."""
    tokens: int = 0
    """Tokens that the model has learned from."""
    tokenizer: str
    """Fingerprint of the tokenizer that the sources were prepared with."""
    sources: tuple[SourceRecord, ...]
    mixture: tuple[MixturePiece, ...]
    """Over `sources`."""
    replay: ReplayRecord | None = None
    schedule: dict[str, Any]
    optimizer_state: Literal["new", "kept", "reset"]
    start_lr: float
    """The rate at which the phase before ended: where a warm-up began."""
    last_lr: float = 0.0

    @property
    def sources_read(self) -> tuple[SourceRecord, ...]:
        """The sources of the mixture, and those that are replayed by name."""
        return (*self.sources, *(self.replay.from_sources if self.replay else ()))

    def replayed_before(self, samples: int) -> int:
        """How many of the phase's first `samples` samples are replayed ones."""
        return samples * self.replay.fraction.numerator // self.replay.fraction.denominator if self.replay else 0

    def own_before(self, samples: int) -> int:
        """How many of the phase's first `samples` samples are its own."""
        return samples - self.replayed_before(samples)

    @property
    def learned_samples(self) -> int:
        """Samples seen that were not passed over."""
        return self.samples - sum(end - first for first, end in self.passed_over)

    @property
    def learned_own(self) -> Ranges:
        """The numbers of the own samples that the model has learned from."""
        edges = [0, *itertools.chain(*self.passed_over), self.samples]
        own = [self.own_before(edge) for edge in edges]
        return tuple((first, end) for first, end in zip(own[::2], own[1::2], strict=True) if first < end)

    @property
    def own_samples(self) -> int:
        """How many these are: what a later phase can replay."""
        return sum(end - first for first, end in self.learned_own)

    @property
    def updates(self) -> int:
        """Updates that were applied, and not undone."""
        return self.learned_samples // self.global_batch_size

    @property
    def budget_steps(self) -> int:
        """Optimizer steps that the phase has in all."""
        return self.budget_samples // self.global_batch_size

    @property
    def steps_of_change(self) -> tuple[int, ...]:
        """The steps with which the pieces of its mixture begin: 1, and where the mixture changes."""
        return tuple(self.step_of_own(piece.first) for piece in self.mixture)

    def step_of(self, sample: int) -> int:
        """The step, 1 being the phase's first, whose batch holds the sample."""
        return sample // self.global_batch_size + 1

    def step_of_own(self, number: int) -> int:
        """The step whose batch holds the own sample of that number, which comes when ceil(g (1 - share)) exceeds it."""
        own = 1 - self.replay.fraction if self.replay else Fraction(1)
        return self.step_of(number * own.denominator // own.numerator)


def pass_over(ranges: Ranges, first: int, end: int) -> Ranges:
    """The ranges and [first, end), which is not empty, together."""
    touched = [each for each in ranges if each[0] <= end and each[1] >= first]
    joined = (min([first, *(begin for begin, _ in touched)]), max([end, *(stop for _, stop in touched)]))
    return tuple(sorted({*ranges} - {*touched} | {joined}))


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The phases that a model went through, in order."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    phases: tuple[PhaseRecord, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that the model has learned from, over all phases."""
        return sum(phase.tokens for phase in self.phases)

    @property
    def sources(self) -> dict[str, SourceRecord]:
        """Every source that the model has seen, by fingerprint, as it was first named."""
        found: dict[str, SourceRecord] = {}
        for phase in self.phases:
            for source in phase.sources_read:
                found.setdefault(source.fingerprint, source)
        return found

    def with_phase(self, record: PhaseRecord) -> "Lineage":
        """This lineage with `record` in place of its last phase where that has the same name, else appended."""
        kept = self.phases[:-1] if self.phases and self.phases[-1].name == record.name else self.phases
        return dataclasses.replace(self, phases=(*kept, record))

    def dump(self) -> str:
        """The lineage as JSON text."""
        tree = {"format": _FORMAT, "version": _VERSION, **_ADAPTER.dump_python(self, mode="json", by_alias=True)}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


_ADAPTER = TypeAdapter(Lineage)


def load_lineage(folder: Path) -> Lineage:
    """The lineage in a checkpoint or run directory. Raises CheckpointError where there is none that can be read."""
    path = folder / "lineage.json"
    try:
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict) or (tree.pop("format", None), tree.pop("version", None)) != (_FORMAT, _VERSION):
            raise CheckpointError(f"{path}: it is not a lineage of version {_VERSION}.")
        return _ADAPTER.validate_python(tree)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {folder} is neither a run nor a checkpoint of megacl.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: it is not a whole lineage: {where}: {first['msg']}.") from None
    except ValueError:
        raise CheckpointError(f"{path}: it is not JSON; restore it from a checkpoint of the run.") from None


def save_lineage(lineage: Lineage, folder: Path) -> None:
    """Publishes lineage.json in `folder`."""
    publish_text(folder / "lineage.json", lineage.dump(), "the lineage")


def describe(lineage: Lineage) -> str:
    """The lineage as readable text: a paragraph a phase."""
    lines: list[str] = []
    for number, phase in enumerate(lineage.phases):
        packed = "packed " if phase.packing == "best_fit" else ""
        state = "" if phase.samples == phase.budget_samples else f" of {phase.budget_samples * phase.seq_length:,}"
        lines.append(f"phase {number}  {phase.name}  (run {phase.run})")
        lines.append(
            f"  {phase.tokens:,}{state} tokens in {phase.samples:,} {packed}sequences of {phase.seq_length}, "
            f"{phase.global_batch_size} a step, seed {phase.seed}, order {phase.order}"
        )
        peak = phase.schedule.get("max_lr")
        lines.append(
            f"  schedule {phase.schedule['kind']}, peak {peak}, from {phase.start_lr:.3g} to {phase.last_lr:.3g}; "
            f"optimizer state {phase.optimizer_state}"
        )
        if phase.passed_over:
            passed_over = phase.samples - phase.learned_samples
            lines.append(f"  passed over {passed_over:,} of these sequences, in {len(phase.passed_over):,} places")
        lines += [f"  {line}" for line in describe_mixture(phase)]
        for source in phase.sources:
            out = "" if source.runs_out is None else f"; would run out at step {phase.step_of(source.runs_out):,}"
            lines.append("  read " + _describe_source(source) + out)
        if phase.replay:
            part = f"{float(phase.replay.fraction):.4g} of each batch, {phase.replay.samples:,} sequences"
            lines.append(f"  replayed {part}, policy {phase.replay.policy}")
            for replayed in phase.replay.from_:
                lines.append(
                    f"    {replayed.samples:,} sequences ({replayed.tokens:,} tokens) of phase {replayed.phase}, "
                    f"draws {replayed.first:,} to {replayed.first + replayed.samples:,}"
                    + ("" if replayed.runs_out is None else f"; up to step {phase.step_of(replayed.runs_out):,}")
                )
            for source in phase.replay.from_sources:
                lines.append("    " + _describe_source(source))
    lines.append(f"{lineage.tokens:,} tokens in all")
    return "\n".join(lines)


def describe_mixture(phase: PhaseRecord) -> list[str]:
    """Which exact shares of a phase's own samples its sources have from which step on, a line for each change."""

    def shares(weights: tuple[int, ...]) -> str:
        named = zip(phase.sources, weights, strict=True)
        return ", ".join(f"{source.name} {weight}/{sum(weights)}" for source, weight in named if weight)

    lines = []
    for piece in phase.mixture:
        since = f"from step {phase.step_of_own(piece.first):,} on " if len(phase.mixture) > 1 or piece.line else ""
        lines.append(f"mixed {since}{shares(piece.weights)}")
        if line := piece.line:
            lines[-1] += f", on a straight line to {shares(line.weights)} at step {phase.step_of_own(line.end):,}"
    return lines


def _describe_source(source: SourceRecord) -> str:
    return (
        f"{source.name}: {source.tokens:,} tokens, draws {source.first:,} to {source.first + source.samples:,}, "
        f"{source.epochs:.2f} epochs; generation {source.generation} of {source.path}, "
        f"fingerprint {source.fingerprint[:12]}"
    )
