"""Which runs and checkpoints saw some documents: asked before these are removed, `megacl data remove ... --runs DIR`.

    sightings, problems = who_saw(state, matches, [Path("runs")])

Order is arithmetic, so nothing has to be kept for this: each phase of a run's lineage is gone through again, sample by
sample, by where in the data its tokens lie, replays included, and no token is read. A sample saw a document if one of
its tokens, the last one to be predicted included, is one of the document's; the EOS behind a document is not. What a
phase passed over was not learned from and does not count. Data is known by its fingerprint, so runs on a copy of the
folder are found too.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacl.checkpoint import list_checkpoints
from megacl.data.generations import FolderState
from megacl.data.manifest import Hashes
from megacl.data.order import Int64
from megacl.data.remove import Matches
from megacl.data.shard_list import ShardList, ShardRow
from megacl.data.shards import open_documents
from megacl.data.source import Source, TokenStream
from megacl.data.stream import PhaseStream, open_recorded
from megacl.errors import CheckpointError, DataError
from megacl.lineage import Lineage, PhaseRecord, SourceRecord, is_part_of, load_lineage

_DEPTH = 4
_STRIDE = 2**44  # more tokens than a source has
_SAMPLES, _TOKENS = 2**18, 2**22


@dataclass(frozen=True)
class Sighting:
    """One phase in the history of a run, or of a checkpoint that lies by itself, that saw some of the documents."""

    run: str
    """The folder that was found."""
    phase: str
    phase_run: str
    """The run that the phase was part of: this one, or the one that it started from."""
    first_step: int
    """The optimizer step of that run with which the first of them came."""
    samples: int
    """How many samples saw some of them: as often, at least, they were learned from."""
    documents: int
    """How many different documents they were."""
    holding: tuple[str, ...]
    """The checkpoints there, RUN@STEP, that came after."""
    before: tuple[str, ...]
    """Those that came before."""


def who_saw(state: FolderState, matches: Matches, roots: Sequence[Path]) -> tuple[list[Sighting], list[str]]:
    """Every phase in the history of some runs that saw one of the documents; and what could not be told, a line each.

    roots: searched for run directories and checkpoints, four folders deep. DataError if one is no folder.
    """
    folder = _Folder(state, matches)
    sightings: list[Sighting] = []
    problems: list[str] = []
    for run in _find_runs(roots):
        try:
            sightings += _sightings_of(run, folder)
        except (CheckpointError, DataError) as error:
            problems.append(f"{run}: what it saw cannot be told: {error}")
    return sightings, problems


def _find_runs(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; name one that holds runs.")
        for place, folders, names in os.walk(root):
            folders.sort()
            if "lineage.json" in names:
                yield Path(place)
            if "lineage.json" in names or len(Path(place).relative_to(root).parts) >= _DEPTH:
                folders.clear()


def _sightings_of(run: Path, folder: "_Folder") -> Iterator[Sighting]:
    checkpoints = {f"{run}@{int(path.name.removeprefix('step-'))}": path for path in list_checkpoints(run)}
    lineages = {name: load_lineage(path) for name, path in checkpoints.items()}
    every = [load_lineage(run), *lineages.values()]
    phases: list[PhaseRecord] = []  # each as far as anything here went
    for index in range(max(len(lineage.phases) for lineage in every)):
        courses = _courses([lineage.phases[index] for lineage in every if len(lineage.phases) > index])
        for phase in courses:
            seen = folder.seen(Lineage(phases=(*phases, phase)))
            if seen is None:
                continue
            holding = [
                name
                for name, lineage in lineages.items()
                if len(lineage.phases) > index
                and lineage.phases[index].samples > seen.first
                and is_part_of(lineage.phases[index], phase)
            ]
            steps = sum(-(-each.samples // each.global_batch_size) for each in phases if each.run == phase.run)
            yield Sighting(
                run=str(run),
                phase=phase.name,
                phase_run=phase.run,
                first_step=steps + seen.first // phase.global_batch_size + 1,
                samples=seen.samples,
                documents=seen.documents,
                holding=tuple(holding),
                before=tuple(name for name in lineages if name not in holding),
            )
        phases.append(courses[0])


def _courses(reached: Sequence[PhaseRecord]) -> list[PhaseRecord]:
    """The furthest that one phase went, and, where a run went back, the furthest of each course that it gave up."""
    courses: list[PhaseRecord] = []
    for phase in sorted(reached, key=lambda phase: -phase.samples):
        if not any(is_part_of(phase, course) for course in courses):
            courses.append(phase)
    return courses


@dataclass(frozen=True)
class _Seen:
    first: int
    """The phase's first sample that saw one of the documents."""
    samples: int
    documents: int


@dataclass(frozen=True)
class _Ranges:
    """Where documents lie: token ranges [begin, end), sorted, none in another; and the documents' hashes."""

    begins: Int64
    ends: Int64
    hashes: Hashes


def _joined(ranges: Sequence[_Ranges]) -> _Ranges:
    none = _Ranges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64))
    begins, ends, hashes = (
        np.concatenate([getattr(each, name) for each in (none, *ranges)]) for name in ("begins", "ends", "hashes")
    )
    order = np.argsort(begins)
    return _Ranges(begins[order], ends[order], hashes[order])


class _Folder:
    """The data folder, as the phases of a lineage read it: positions instead of tokens."""

    def __init__(self, state: FolderState, matches: Matches) -> None:
        self.state, self.matches = state, matches
        self.found: dict[str, _Seen | None] = {}  # runs have earlier runs' phases in their histories

    def seen(self, lineage: Lineage) -> _Seen | None:
        """What the lineage's last phase saw of the documents."""
        if lineage.id not in self.found:
            self.found[lineage.id] = self._look(lineage)
        return self.found[lineage.id]

    def _look(self, lineage: Lineage) -> _Seen | None:
        record = lineage.phases[-1]
        packed = any(phase.packing == "best_fit" for phase in _phases_read(lineage))
        bases: dict[str, int] = {}
        ranges: list[_Ranges] = []

        def open_positions(source: SourceRecord) -> Source:
            rows = self._rows_of(source)
            base = _STRIDE * (len(bases) + 1) if rows is not None else -2 * _STRIDE
            if rows is not None:
                ranges.append(self._ranges(rows, base))
            bases[source.fingerprint] = base
            if rows is None and packed:  # where its documents end matters then
                return open_recorded(source)
            return self._source(source, rows, base)

        stream = PhaseStream(lineage, open_positions)
        every = _joined(ranges)
        if not len(every.begins):
            return None
        whole = not packed and all(phase.seq_length == record.seq_length for phase in _phases_read(lineage))
        chunk = _SAMPLES if whole else max(1, _TOKENS // (record.seq_length + 1))
        first, count, hit = -1, 0, np.zeros(len(every.begins), np.bool_)
        base_of = np.array([bases[source.fingerprint] for source in stream.sources], np.int64)
        passed_over = np.array(record.passed_over, np.int64).ravel()
        for start in range(0, record.samples, chunk):
            samples = np.arange(start, min(start + chunk, record.samples))
            samples = samples[np.searchsorted(passed_over, samples, side="right") % 2 == 0]
            if not samples.size:
                continue
            if whole:
                located = stream.locate(samples)
                seen = _by_stretches(every, base_of[located.source] + located.start, record.seq_length + 1, hit)
            else:
                seen = _by_positions(every, stream.read(samples), hit)
            if count == 0 and seen.any():
                first = int(samples[np.argmax(seen)])
            count += int(seen.sum())
        return _Seen(first, count, len(np.unique(every.hashes[hit]))) if count else None

    def _rows_of(self, source: SourceRecord) -> Int64 | None:
        """Which rows of the folder are the source's training data; None if it is other data."""
        shards, state = self.state.shards, self.state
        if source.generation > state.number:
            return None
        chosen = shards.is_at(source.generation) & (shards.numbers("added") > source.since)
        if shards.where(chosen).fingerprint(state.tokenizer.fingerprint, state.dtype) != source.fingerprint:
            return None
        return np.flatnonzero(chosen & ~shards.held_out())

    def _ranges(self, rows: Int64, base: int) -> _Ranges:
        shards = self.state.shards
        lengths = shards.numbers("tokens")[rows]
        found: list[_Ranges] = []
        for row, begin in zip(rows.tolist(), (np.cumsum(lengths) - lengths + base).tolist(), strict=True):
            if row in self.matches.places:
                documents = open_documents(self.state.folder, shards.row(row), self.state.dtype)
                places = self.matches.places[row]
                offsets = begin + documents.offsets.astype(np.int64)
                found.append(_Ranges(offsets[places], offsets[places + 1] - 1, documents.hashes[places]))  # without EOS
            elif not (self.state.folder / shards.row(row).path).exists():
                raise DataError(f"{self.state.folder}: shards that it read were purged from the disk earlier.")
        return _joined(found)

    def _source(self, source: SourceRecord, rows: Int64 | None, base: int) -> Source:
        """A source whose tokens are their positions, counted from `base`; of other data only the length matters."""
        state = self.state
        one = ShardRow("", "train", 1, source.train_tokens, 0, 0, 0, "00" * 32)
        shards = ShardList.of_rows([one]) if rows is None else state.shards.take(rows)
        positions = _Positions(state.folder, shards, base)
        return Source(
            name=source.name,
            folder=Path(source.path),
            generation=source.generation,
            since=source.since,
            fingerprint=source.fingerprint,
            dtype=state.dtype,
            tokenizer_fingerprint=state.tokenizer.fingerprint,
            tokenizer_name=state.tokenizer.file,
            vocab_size=state.tokenizer.vocab_size,
            eos_id=state.tokenizer.eos_id,
            held_out=state.validation,
            train=positions,
            validation=positions,
        )


class _Positions(TokenStream):
    """A stream whose tokens are their own positions."""

    def __init__(self, folder: Path, shards: ShardList, base: int) -> None:
        super().__init__(folder, shards, "uint32")
        self.base = base

    def read(self, start: int, length: int) -> Any:
        return self.base + np.arange(start, start + length)

    def gather(self, starts: Int64, length: int) -> Int64:
        found: Int64 = self.base + starts[:, None] + np.arange(length)
        return found


def _phases_read(lineage: Lineage) -> list[PhaseRecord]:
    """The last phase, and those that it replays."""
    record = lineage.phases[-1]
    replayed = {entry.phase for entry in record.replay.from_} if record.replay else set()
    return [record, *(phase for phase in lineage.phases if phase.name in replayed)]


def _by_stretches(ranges: _Ranges, starts: Int64, length: int, hit: Any) -> Any:
    """Which samples, each `length` tokens from a start on, lie over one of the ranges; those are marked in `hit`."""
    first = np.searchsorted(ranges.ends, starts, side="right")
    last = np.searchsorted(ranges.begins, starts + length, side="left")
    seen = first < last
    edges = np.zeros(len(ranges.begins) + 1, np.int64)
    np.add.at(edges, first[seen], 1)
    np.add.at(edges, last[seen], -1)
    hit |= np.cumsum(edges[:-1]) > 0
    return seen


def _by_positions(ranges: _Ranges, positions: Int64, hit: Any) -> Any:
    """Which samples, given as the positions of their tokens, [N, T + 1], have one in a range; likewise."""
    index = np.searchsorted(ranges.begins, positions, side="right") - 1
    inside = (index >= 0) & (positions < ranges.ends[index])
    hit[np.unique(index[inside])] = True
    return inside.any(axis=1)
