"""What a model has ever seen, phase by phase: enough to recompute every sample of its history.

    lineage = load_lineage(Path("runs/x"))     # a run directory or a checkpoint; it matches its ids, or is refused
    lineage.phases, lineage.events             # what was learned; branches off other runs, and merges, between phases
    lineage.ids, lineage.id                    # one for each entry; the last one, which stands for the whole history

A lineage is a file, lineage.json, in each checkpoint and in the run directory. It holds the phases of earlier runs that
the model went through first. Since order is arithmetic, a phase is described by its sources' fingerprints, the seed,
the sequence length, the integer weights with the places where they change, by how far it went and what it passed over;
nothing else is stored about the order of data.

An entry's id is a SHA-256 over the id of the entry before it and over the entry, so that it stands for all that led
there. The last entry is often a phase under way: the id of such a checkpoint is that of the phase as far as it went
then, and each step gives the phase another id. Entries before the last one never change, so neither do their ids. A
branch or merge names other checkpoints by their ids, which holds their histories too.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megacl.config_phase import ReptileConfig
from megacl.errors import CheckpointError
from megacl.model.config import STRICT
from megacl.publish import publish_text

_FORMAT, _VERSION = "megacl-lineage", 5
_BEFORE_ALL = hashlib.sha256(b"").hexdigest()

OptimizerState = Literal["new", "kept", "reset", "step_reset"]
"""What became of the optimizer's state where a phase began."""

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
    """The number of its first sample among those that the mixture deals out: a phase's own, or its replayed ones.
    Negative where the phase continues another one, in which the stretch has begun."""
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
    shift: int = 0
    """The samples of the phase that this one continues, if it does: sample g is a replayed one iff sample g + shift
    would be there."""
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
    optimizer_state: OptimizerState
    """Where the phase began: new where there was none, step_reset where Adam's moments were kept alone."""
    reptile: ReptileConfig | None = None
    """As configured."""
    start_lr: float
    """The rate at which the phase before ended: where a warm-up began."""
    last_lr: float = 0.0

    @property
    def sources_read(self) -> tuple[SourceRecord, ...]:
        """The sources of the mixture, and those that are replayed by name."""
        return (*self.sources, *(self.replay.from_sources if self.replay else ()))

    def replayed_before(self, samples: int) -> int:
        """How many of the phase's first `samples` samples are replayed ones."""
        if self.replay is None:
            return 0
        share, shift = self.replay.fraction, self.replay.shift
        return (samples + shift) * share.numerator // share.denominator - shift * share.numerator // share.denominator

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
        """The step whose batch holds the own sample of that number, which comes when ceil(g (1 - share)) exceeds it.

        The first step for a negative number, of a sample before the phase.
        """
        if self.replay is None:
            return self.step_of(max(number, 0))
        own, shift = 1 - self.replay.fraction, self.replay.shift
        since_shift = max(number, 0) + math.ceil(shift * own)
        return self.step_of(since_shift * own.denominator // own.numerator - shift)


def pass_over(ranges: Ranges, first: int, end: int) -> Ranges:
    """The ranges and [first, end), which is not empty, together."""
    touched = [each for each in ranges if each[0] <= end and each[1] >= first]
    joined = (min([first, *(begin for begin, _ in touched)]), max([end, *(stop for _, stop in touched)]))
    return tuple(sorted({*ranges} - {*touched} | {joined}))


def is_part_of(phase: PhaseRecord, course: PhaseRecord) -> bool:
    """Whether a state of a phase comes before another one of it, or is the same."""
    before = ((first, min(end, phase.samples)) for first, end in course.passed_over if first < phase.samples)
    return phase.samples <= course.samples and phase.passed_over == tuple(before)


@dataclass(frozen=True, kw_only=True)
class CheckpointMark:
    """A checkpoint, by its place and by its content."""

    run: str
    """The name of the run directory."""
    step: int
    tokens: int
    """Tokens that the model had learned from, over all phases."""
    id: str
    """The id of its lineage."""
    weights: str
    """SHA-256 over the names of its weights and the SHA-256 of each (docs/formats.md), whatever files they stand in."""


@dataclass(frozen=True, kw_only=True)
class MergedCheckpoint(CheckpointMark):
    """One of the checkpoints of a merge."""

    weight: float
    """Its part of the mean."""


@dataclass(frozen=True, kw_only=True)
class BranchRecord:
    """A run began from a checkpoint of another one."""

    kind: Literal["branch"] = "branch"
    after: int
    """How many phases precede it."""
    checkpoint: CheckpointMark
    """Its lineage is what stands before this entry."""


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """The weights became a weighted mean of several checkpoints'."""

    kind: Literal["merge"] = "merge"
    name: str
    """What its evaluation is recorded under: no phase's name, and no other merge's."""
    after: int
    """How many phases precede it."""
    shape: str
    """The decay of the learning rate that the mean imitates."""
    checkpoints: Annotated[tuple[MergedCheckpoint, ...], Field(min_length=1)]
    """Oldest first; the lineage of the last one is what stands before this entry."""


@dataclass(frozen=True, kw_only=True)
class ConversionRecord:
    """The model went from one format to another: out of megacl, into it, or past it."""

    kind: Literal["conversion"] = "conversion"
    after: int
    """How many phases precede it."""
    from_: Annotated[str, Field(alias="from")]
    """The format that was read."""
    to: str
    """The format that was written."""
    name: str
    """What was read: the name of its file or folder."""
    checkpoint: CheckpointMark | None = None
    """The checkpoint that was read, where it is megacl's: its lineage is what stands before this entry."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of weights, by name: of those read, or, out of megacl, of those written."""
    notes: tuple[str, ...] = ()
    """What was changed or left out on the way, and why."""


@dataclass(frozen=True, kw_only=True)
class VocabularyRecord:
    """The tokenizer was extended, and the model had rows of its vocabulary for the new tokens."""

    kind: Literal["vocabulary"] = "vocabulary"
    after: int
    """How many phases precede it."""
    tokenizer_before: str
    """Fingerprint of the tokenizer up to here."""
    tokenizer: str
    """Fingerprint of the one from here on, which extends it."""
    tokens_before: int
    tokens: int
    rows_before: int
    """Of the embedding, padding included."""
    rows: int
    new_rows: Literal["mean", "pieces"]
    """What the rows of new tokens began as."""
    from_pieces: int
    """How many of them began as the mean of the pieces that had spelled them; the others as the mean of all tokens."""


Event = Annotated[BranchRecord | MergeRecord | ConversionRecord | VocabularyRecord, Field(discriminator="kind")]
Entry = PhaseRecord | BranchRecord | MergeRecord | ConversionRecord | VocabularyRecord


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The phases that a model went through, in order, and what happened between them."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    phases: tuple[PhaseRecord, ...] = ()
    events: tuple[Event, ...] = ()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Phases and events, as they came."""
        found: list[Entry] = []
        for count in range(len(self.phases) + 1):
            found += self.phases[count - 1 : count] if count else ()
            found += [event for event in self.events if event.after == count]
        return tuple(found)

    @property
    def ids(self) -> tuple[str, ...]:
        """The id of each of `entries`: hexadecimal SHA-256 of the one before it and of the entry (docs/formats.md)."""
        return tuple(itertools.accumulate(self.entries, _id_of, initial=_BEFORE_ALL))[1:]

    @property
    def id(self) -> str:
        """The id of the last entry, which stands for the whole history; SHA-256 of nothing where there is none."""
        return self.ids[-1] if self.entries else _BEFORE_ALL

    @property
    def untrained_merge(self) -> bool:
        """Whether the weights are a mean of checkpoints, which has no optimizer's state, and not trained since."""
        return any(isinstance(event, MergeRecord) and event.after == len(self.phases) for event in self.events)

    @property
    def names(self) -> frozenset[str]:
        """Those of its phases and merges, under which evaluations are recorded."""
        return frozenset(entry.name for entry in self.entries if isinstance(entry, PhaseRecord | MergeRecord))

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
        """This lineage with `record` in place of its last entry where that is the same run's phase, else appended."""
        last = self.entries[-1] if self.entries else None
        same = isinstance(last, PhaseRecord) and (last.run, last.name) == (record.run, record.name)
        return dataclasses.replace(self, phases=(*(self.phases[:-1] if same else self.phases), record))

    def with_event(self, event: Event) -> "Lineage":
        """This lineage with `event` appended. ValueError where that stands elsewhere than after its last phase."""
        if event.after != len(self.phases):
            raise ValueError(f"the event stands after {event.after} phases, and the lineage has {len(self.phases)}")
        return dataclasses.replace(self, events=(*self.events, event))

    def dump(self) -> str:
        """The lineage as JSON text."""
        tree: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "phases": [], "events": []}
        for own, entry in zip(self.ids, self.entries, strict=True):
            tree[_list_of(entry)].append({"id": own, **_plain(entry)})
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


_ADAPTER = TypeAdapter(Lineage)
_ENTRY = TypeAdapter(Entry)


def _list_of(entry: Entry) -> str:
    """The list in the file that holds an entry."""
    return "phases" if isinstance(entry, PhaseRecord) else "events"


def _plain(entry: Entry) -> dict[str, Any]:
    """An entry as it stands in the file, but for its id."""
    tree: dict[str, Any] = json.loads(_ENTRY.dump_json(entry, by_alias=True))
    return tree


def _id_of(before: str, entry: Entry) -> str:
    canonical = json.dumps(_plain(entry), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(f"{before}\n{canonical}".encode()).hexdigest()


def load_lineage(folder: Path, name: str = "lineage.json") -> Lineage:
    """The lineage in a checkpoint or run directory; or in another folder, under the name that it has there.

    Raises CheckpointError where there is none that can be read, or where an entry does not match its id.
    """
    lineage, stored = read_lineage(folder, name)
    if changed := changed_entries(lineage, stored):
        raise CheckpointError(
            f"{folder / name}: {entry_name(lineage, changed[0])} does not match its id: it was changed. "
            "Restore the file, or take a checkpoint's; `megacl lineage MODEL --verify` says what holds."
        )
    return lineage


def read_lineage(folder: Path, name: str = "lineage.json") -> tuple[Lineage, tuple[str, ...]]:
    """The lineage as `load_lineage` finds it, and the ids that stand beside its entries, not compared with them.

    Raises CheckpointError where there is none that can be read.
    """
    path = folder / name
    try:
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict) or (tree.pop("format", None), tree.pop("version", None)) != (_FORMAT, _VERSION):
            raise CheckpointError(f"{path}: it is not a lineage of version {_VERSION}.")
        ids = {key: iter(_pop_ids(tree.get(key))) for key in ("phases", "events")}
        lineage = _ADAPTER.validate_python(tree)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {folder} is neither a run nor a checkpoint of megacl.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: it is not a whole lineage: {where}: {first['msg']}.") from None
    except ValueError:
        raise CheckpointError(f"{path}: it is not JSON; restore it from a checkpoint of the run.") from None
    places = [event.after for event in lineage.events]
    if places != sorted(places) or any(not 0 <= place <= len(lineage.phases) for place in places):
        raise CheckpointError(f"{path}: it is not a whole lineage: events: they stand after {places} phases.")
    return lineage, tuple(next(ids[_list_of(entry)]) for entry in lineage.entries)


def _pop_ids(entries: object) -> list[str]:
    """Takes the ids out of one of the file's lists."""
    trees = entries if isinstance(entries, list) else []
    return [str(tree.pop("id", None)) for tree in trees if isinstance(tree, dict)]


def changed_entries(lineage: Lineage, stored: Sequence[str]) -> list[int]:
    """Which of the entries do not match the ids that stand beside them and beside the entries before them.

    A branch, a conversion out of megacl, and the last checkpoint of a merge must name the history that stands before.
    """
    found = []
    for index, (before, own, entry) in enumerate(zip((_BEFORE_ALL, *stored), stored, lineage.entries, strict=False)):
        origin = before
        if marks := marks_of(entry):
            origin = marks[-1].id
        if own != _id_of(before, entry) or origin != before:
            found.append(index)
    return found


def marks_of(entry: Entry) -> tuple[CheckpointMark, ...]:
    """The checkpoints that an entry names; the last one has the history that stands before it."""
    if isinstance(entry, MergeRecord):
        return entry.checkpoints
    if isinstance(entry, BranchRecord):
        return (entry.checkpoint,)
    if isinstance(entry, ConversionRecord) and entry.checkpoint is not None:
        return (entry.checkpoint,)
    return ()


def entry_name(lineage: Lineage, index: int) -> str:
    """How one of a lineage's entries is spoken of."""
    entry = lineage.entries[index]
    if isinstance(entry, PhaseRecord):
        return f"phase {entry.name!r} of run {entry.run}"
    where = f"after phase {lineage.phases[entry.after - 1].name!r}" if entry.after else "at the beginning"
    return f"the {entry.kind} {where}"


def save_lineage(lineage: Lineage, folder: Path, permit: Callable[[], None] = lambda: None) -> None:
    """Publishes lineage.json in `folder`; permit: called before that, it may raise."""
    publish_text(folder / "lineage.json", lineage.dump(), "the lineage", permit)
