"""What a model has ever seen, phase by phase: enough to recompute every sample of its history.

A lineage is a file, lineage.json, in each checkpoint and in the run directory. It holds the phases of earlier runs that
the model went through first. Since order is arithmetic, a phase is described by its sources' fingerprints, the seed,
the sequence length, the integer weights, and by how far it went; nothing else is stored about the order of data.
"""

import dataclasses
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megacl.errors import CheckpointError
from megacl.model.config import STRICT
from megacl.publish import publish_text

_FORMAT, _VERSION = "megacl-lineage", 1


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """One source of a phase, and which of its draws the phase took: [first, first + samples)."""

    name: str
    path: str
    generation: int
    since: int = 0
    """What this earlier generation held was left out; 0: nothing was."""
    fingerprint: str
    train_tokens: int
    weight: int
    """Integer share of the mixture; a sample is one of this source in `weight` of every sum-of-weights."""
    first: int
    samples: int = 0
    share: float = 0.0
    """weight as a part of one, for the reader's eye."""
    tokens: int = 0
    tokens_before: int = 0
    """Tokens that earlier phases had read from the same folder, in any cut, order and generation."""
    epochs: float = 0.0
    """tokens_before + tokens, as a part of what there is to read: above 1, something was read twice."""


@dataclass(frozen=True, kw_only=True)
class ReplayedPhase:
    """An earlier phase that a phase replays, and how many of its tokens earlier replays had read already."""

    phase: str
    weight: int
    first_token: int
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class ReplayRecord:
    """What a phase replayed: earlier phases, or named sources where the model's own history is unknown."""

    share: str
    """An exact fraction, "1/4"."""
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
    global_batch_size: int
    budget_samples: int
    samples: int = 0
    """Samples seen, replayed ones included; budget_samples once the phase is over."""
    tokens: int = 0
    tokenizer: str
    """Fingerprint of the tokenizer that the sources were prepared with."""
    sources: tuple[SourceRecord, ...]
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

    @property
    def replayed_samples(self) -> int:
        """How many of the samples seen were replayed ones."""
        return self.samples * self.replay.fraction.numerator // self.replay.fraction.denominator if self.replay else 0

    @property
    def own_samples(self) -> int:
        """Samples seen that were not replayed: what a later phase can replay."""
        return self.samples - self.replayed_samples


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
        state = "" if phase.samples == phase.budget_samples else f" of {phase.budget_samples * phase.seq_length:,}"
        lines.append(f"phase {number}  {phase.name}  (run {phase.run})")
        lines.append(
            f"  {phase.tokens:,}{state} tokens in {phase.samples:,} sequences of {phase.seq_length}, "
            f"{phase.global_batch_size} a step, seed {phase.seed}, order {phase.order}"
        )
        peak = phase.schedule.get("max_lr")
        lines.append(
            f"  schedule {phase.schedule['kind']}, peak {peak}, from {phase.start_lr:.3g} to {phase.last_lr:.3g}; "
            f"optimizer state {phase.optimizer_state}"
        )
        for source in phase.sources:
            lines.append("  read " + _describe_source(source))
        if phase.replay:
            part = f"{float(phase.replay.fraction):.4g} of each batch, {phase.replay.samples:,} sequences"
            lines.append(f"  replayed {part}")
            for replayed in phase.replay.from_:
                lines.append(
                    f"    {replayed.samples:,} sequences ({replayed.tokens:,} tokens) of phase {replayed.phase}, "
                    f"from its token {replayed.first_token:,} on"
                )
            for source in phase.replay.from_sources:
                lines.append("    " + _describe_source(source))
    lines.append(f"{lineage.tokens:,} tokens in all")
    return "\n".join(lines)


def _describe_source(source: SourceRecord) -> str:
    return (
        f"{source.name}: {source.tokens:,} tokens, draws {source.first:,} to {source.first + source.samples:,}, "
        f"{source.epochs:.2f} epochs; generation {source.generation} of {source.path}, "
        f"fingerprint {source.fingerprint[:12]}"
    )
