"""The samples of a phase: index g -> tokens, a pure function of the lineage.

record = plan_phase(lineage, phase, sources, ...)       # data/planning.py: where sources and replays go on
stream = PhaseStream(lineage.with_phase(record), open_source)
tokens = stream.read(np.arange(64))                     # int64 [64, T + 1]
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacl.data.mixture import Mixture
from megacl.data.order import Int64, permuted
from megacl.data.packing import PackedSequences
from megacl.data.replay import Kept, Recut, is_replayed, replay_key, replayed_before, times_replayed
from megacl.data.sequences import AnySequences, build_sequences
from megacl.data.source import Source, open_source
from megacl.data.store import ShardCache
from megacl.errors import DataError, UnreachableError
from megacl.lineage import Lineage, MixturePiece, PhaseRecord, Ranges, SourceRecord

OpenSource = Callable[[SourceRecord], Source]


def open_recorded(record: SourceRecord, known: Iterable[Source] = (), cache: ShardCache | None = None) -> Source:
    """The source that a lineage names, from `known` or from where it lay; DataError where that is other data now.

    cache: where the shards of one that lies on a store are fetched to.
    """
    for source in known:
        if source.fingerprint == record.fingerprint:
            return source
    reads = f"the model's history reads source {record.name!r}, fingerprint {record.fingerprint[:12]}"
    try:
        source = open_source(record.path, record.generation, record.since, cache)
    except UnreachableError as error:
        raise UnreachableError(f"{reads}: {error}") from None
    except DataError as error:
        raise DataError(
            f"{reads}, which is gone: {str(error).rstrip('.')}. If it lies elsewhere now, name that folder in sources."
        ) from None
    if source.fingerprint != record.fingerprint:
        raise DataError(
            f"{record.path}: generation {record.generation} has fingerprint {source.fingerprint[:12]}, but the model "
            f"was trained on {record.fingerprint[:12]}; restore the data that source {record.name!r} had."
        )
    return source


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    """A block that reads shards of a source: where one cannot be read, the error says of which source it is."""
    try:
        yield
    except DataError as error:
        name = f"source {source.name!r}, fingerprint {source.fingerprint[:12]}"
        raise type(error)(f"reading {name}: {error}") from None


# ---------------------------------------------------------------------------------------------- its samples


@dataclass(frozen=True)
class Located:
    """Where samples come from. All arrays have one element a sample."""

    replayed: NDArray[np.bool_]
    phase: Int64
    """Index in the lineage of the phase whose own sample this is; -1 where a named source is replayed."""
    source: Int64
    """Index in `PhaseStream.sources`."""
    start: Int64
    """Where in the source's training stream the sample's first token lies; a packed sample's row (data/packing.py)."""


@dataclass(frozen=True)
class _OwnSamples:
    """A phase's own samples, those that are not replayed, by their number."""

    cuts: tuple[AnySequences, ...]
    firsts: Int64
    numbers: Int64
    """The sources' places in the stream's list."""
    mixture: Mixture
    kept: Kept | None = None
    """Of a phase that is replayed: its own samples that count, where it passed some over."""

    def locate(self, samples: Int64) -> tuple[Int64, Int64]:
        """(index among this phase's sources, start) of own samples, int64 [N]."""
        source, draw = self.mixture.locate(samples if self.kept is None else self.kept.numbers(samples))
        draw = draw + self.firsts[source]
        starts = np.empty_like(samples)
        for index, cut in enumerate(self.cuts):
            mine = source == index
            if mine.any():
                starts[mine] = cut.starts(draw[mine])
        return source, starts

    def read(self, samples: Int64) -> Int64:
        """Tokens, int64 [N, T + 1], of own samples, int64 [N]."""
        source, starts = self.locate(samples)
        if len(self.cuts) == 1:  # most of the time of reading is copying: once is enough
            with _reading(self.cuts[0].source):
                return self.cuts[0].read(starts)
        tokens = np.empty((samples.size, self.cuts[0].seq_length + 1), dtype=np.int64)
        for index, cut in enumerate(self.cuts):
            mine = np.flatnonzero(source == index)
            if mine.size:
                with _reading(cut.source):
                    tokens[mine] = cut.read(starts[mine])
        return tokens


@dataclass(frozen=True)
class _Replayed:
    """An earlier phase that is replayed."""

    index: int
    own: _OwnSamples
    recut: Recut
    first: int
    """The draw, counted over all rounds, with which this phase's replay of it begins."""
    key: int | None
    """Of the permutation of its pieces; None where they are read in their order."""

    def pieces(self, draws: Int64) -> Int64:
        """Which piece each of this phase's draws takes: int64 [N] -> int64 [N]."""
        if self.key is None:
            return (self.first + draws) % self.recut.n
        return permuted(self.first + draws, self.recut.n, self.key)


class PhaseStream:
    """The samples of a lineage's last phase, by index g in [0, budget). Holds open files and nothing else."""

    def __init__(self, lineage: Lineage, open_source: OpenSource) -> None:
        """open_source: gives the opened source of a record; `open_recorded` is the usual one."""
        self._lineage = lineage
        self.record = lineage.phases[-1]
        self._index = len(lineage.phases) - 1
        self.sources: list[Source] = []
        self._open = open_source
        self._numbers: dict[str, int] = {}
        record = self.record
        self._own = self._samples_of(record, record.sources, record.mixture)
        self._replayed_phases: list[_Replayed] = []
        self._replayed_sources: _OwnSamples | None = None
        self._lost = functools.lru_cache(maxsize=1)(self._count_lost)  # asked at every step, and seldom another
        replay = record.replay
        if replay is None:
            return
        self._replay_mixture = Mixture(replay.mixture)
        by_name = {phase.name: index for index, phase in enumerate(lineage.phases[:-1])}
        for entry in replay.from_:
            earlier = lineage.phases[by_name[entry.phase]]
            own = self._samples_of(earlier, earlier.sources, earlier.mixture)
            if earlier.passed_over:
                own = dataclasses.replace(own, kept=Kept(earlier.learned_own))
            recut = Recut(own.read, earlier.own_samples, earlier.seq_length, record.seq_length)
            key = replay_key(earlier, record.seq_length) if replay.policy == "uniform" else None
            self._replayed_phases.append(_Replayed(by_name[entry.phase], own, recut, entry.first, key))
        if replay.from_sources:
            self._replayed_sources = self._samples_of(record, replay.from_sources, replay.mixture)

    def _samples_of(
        self, phase: PhaseRecord, records: tuple[SourceRecord, ...], pieces: tuple[MixturePiece, ...]
    ) -> _OwnSamples:
        numbers = []
        for source in records:
            if source.fingerprint not in self._numbers:
                self._numbers[source.fingerprint] = len(self.sources)
                self.sources.append(self._open(source))
            numbers.append(self._numbers[source.fingerprint])
        cuts = []
        for number, source in zip(numbers, records, strict=True):
            opened = self.sources[number]
            with _reading(opened) if phase.packing == "best_fit" else contextlib.nullcontext():  # it opens all shards
                cuts.append(build_sequences(opened, phase.seq_length, phase.seed, source.window, phase.packing))
        return _OwnSamples(
            cuts=tuple(cuts),
            firsts=np.array([source.first for source in records], dtype=np.int64),
            numbers=np.array(numbers, dtype=np.int64),
            mixture=Mixture(pieces),
        )

    def source_of(self, record: SourceRecord) -> Source:
        """The opened source of a record."""
        return self.sources[self._numbers[record.fingerprint]]

    def check_replayed(self) -> None:
        """Looks whether every shard of what is replayed is there, and raises DataError where one is not.

        It asks the file system once a shard; of sources on a store nothing is asked.
        """
        replayed = [(f"phase {each.name!r}, which read ", each.sources) for each in self._phases_replayed()]
        replayed.append(("", self.record.replay.from_sources if self.record.replay else ()))
        for what, records in replayed:
            for record in records:
                source = self.source_of(record)
                folder = source.local
                if folder is None:
                    continue
                gone = [path for path in source.train.shards.paths() if not (folder / path).exists()]
                if gone:
                    raise DataError(
                        f"phase {self.record.name!r} replays {what}source {record.name!r}, fingerprint "
                        f"{record.fingerprint[:12]}, and {len(gone)} of its shards are gone: {folder / gone[0]} "
                        "is the first. Restore them, or take it out of the replay."
                    )

    def _phases_replayed(self) -> list[PhaseRecord]:
        return [self._lineage.phases[replayed.index] for replayed in self._replayed_phases]

    @property
    def seq_length(self) -> int:
        """T: tokens that a sample predicts."""
        return self.record.seq_length

    @property
    def padded(self) -> bool:
        """Whether samples may end with PADDING: own ones, or those of a replayed phase."""
        every = [self._own, *(replayed.own for replayed in self._replayed_phases)]
        return any(isinstance(cut, PackedSequences) for samples in every for cut in samples.cuts)

    def scattered(self) -> Iterator[tuple[str | None, SourceRecord, int]]:
        """(replayed phase or None, source, bytes) where neighbouring samples lie in any of so many bytes of shards."""
        record = self.record
        for source in record.sources_read:
            if source.window is None:
                yield None, source, int(self.source_of(source).train.sizes.sum())
        if record.replay is None:
            return
        for replayed in self._replayed_phases:
            earlier = self._lineage.phases[replayed.index]
            for source in earlier.sources:
                train = self.source_of(source).train
                if source.window is None:
                    yield earlier.name, source, int(train.sizes.sum())
                elif record.replay.policy == "uniform":  # over all that was read, whatever windows it was read in
                    yield earlier.name, source, int(train.sizes.sum() * min(1.0, source.tokens / train.tokens))

    def packings(self) -> list[str]:
        """How full the phase's own packed sequences are, a line a source."""
        every = [*self._own.cuts, *(self._replayed_sources.cuts if self._replayed_sources else ())]
        return [
            f"{cut.source.name}: packed into {cut.n:,} sequences, {cut.fill:.2%} full"
            for cut in every
            if isinstance(cut, PackedSequences)
        ]

    def _parts(self, samples: Int64) -> tuple[NDArray[np.bool_], Int64]:
        """Which samples are replayed ones, and each one's number among its kind."""
        replay = self.record.replay
        if replay is None:
            return np.zeros(samples.shape, dtype=np.bool_), samples
        share = replay.fraction
        places = samples + replay.shift
        before = replayed_before(places, share) - replay.shift * share.numerator // share.denominator
        replayed = is_replayed(places, share)
        return replayed, np.where(replayed, before, samples - before)

    def locate(self, samples: Int64) -> Located:
        """Where each sample comes from. samples: int64 [N], in [0, budget)."""
        replayed, number = self._parts(samples)
        phase, source, start = (np.full(samples.shape, -1, dtype=np.int64) for _ in range(3))
        new, again = np.flatnonzero(~replayed), np.flatnonzero(replayed)
        phase[new] = self._index
        index, start[new] = self._own.locate(number[new])
        source[new] = self._own.numbers[index]
        if self._replayed_sources is not None:
            index, start[again] = self._replayed_sources.locate(number[again])
            source[again] = self._replayed_sources.numbers[index]
        for which, replayed_phase, pieces in self._pieces(number[again]):
            mine, own = again[which], replayed_phase.own
            first, offset = replayed_phase.recut.first_of(pieces)
            index, begin = own.locate(first)
            phase[mine], source[mine], start[mine] = replayed_phase.index, own.numbers[index], begin + offset
        return Located(replayed, phase, source, start)

    def read(self, samples: Int64) -> Int64:
        """Tokens, int64 [N, T + 1], of samples, int64 [N] in [0, budget); where `padded`, some are PADDING."""
        replayed, number = self._parts(samples)
        if not replayed.any():
            return self._own.read(number)
        tokens = np.empty((samples.size, self.seq_length + 1), dtype=np.int64)
        new, again = np.flatnonzero(~replayed), np.flatnonzero(replayed)
        if new.size:
            tokens[new] = self._own.read(number[new])
        if again.size and self._replayed_sources is not None:
            tokens[again] = self._replayed_sources.read(number[again])
        for which, replayed_phase, pieces in self._pieces(number[again]):
            tokens[again[which]] = replayed_phase.recut.read(pieces)
        return tokens

    def _pieces(self, replays: Int64) -> Iterator[tuple[Int64, "_Replayed", Int64]]:
        """For each replayed phase: which of `replays` (numbered among themselves) read it, and which piece."""
        if not self._replayed_phases:
            return
        entry, number = self._replay_mixture.locate(replays)
        for index, replayed_phase in enumerate(self._replayed_phases):
            which = np.flatnonzero(entry == index)
            if which.size:
                yield which, replayed_phase, replayed_phase.pieces(number[which])

    def seen(self, samples: int, last_lr: float, passed_over: Ranges | None = None) -> PhaseRecord:
        """The phase's record after its first `samples` samples, of which the last was learned at rate `last_lr`.

        passed_over: those from which the model has not learned; None: as in the record so far.
        """
        passed_over = self.record.passed_over if passed_over is None else passed_over
        record = dataclasses.replace(self.record, samples=samples, passed_over=passed_over, last_lr=last_lr)
        own_lost, replayed_lost = self._lost(passed_over)
        sources = self._counted(record.sources, self._own, record.own_before(samples), own_lost)
        replay = record.replay
        if replay is not None:
            replayed = record.replayed_before(samples)
            counts = self._replay_mixture.counts(replayed)
            replay = dataclasses.replace(
                replay,
                samples=replayed,
                from_=tuple(
                    dataclasses.replace(entry, samples=int(count), tokens=int(count - lost) * self.seq_length)
                    for entry, count, lost in zip(replay.from_, counts, replayed_lost, strict=False)
                ),
                from_sources=self._counted(replay.from_sources, self._replayed_sources, replayed, replayed_lost)
                if self._replayed_sources
                else (),
            )
        tokens = record.learned_samples * self.seq_length
        return dataclasses.replace(record, tokens=tokens, sources=sources, replay=replay)

    def _counted(
        self, records: tuple[SourceRecord, ...], samples: _OwnSamples, total: int, lost: Int64
    ) -> tuple[SourceRecord, ...]:
        def counted(record: SourceRecord, cut: AnySequences, count: int, learned: int) -> SourceRecord:
            tokens = learned * self.seq_length
            epochs = (record.tokens_before + tokens) / (cut.n * self.seq_length)
            return dataclasses.replace(record, samples=count, tokens=tokens, epochs=epochs)

        counts = samples.mixture.counts(total)
        return tuple(map(counted, records, samples.cuts, counts.tolist(), (counts - lost).tolist()))

    def _count_lost(self, passed_over: Ranges) -> tuple[Int64, Int64]:
        """How many draws of each own source, and of each replayed phase or source, lie in ranges of the samples."""

        def inside(mixture: Mixture, before: Callable[[int], int]) -> Int64:
            lost = np.zeros(len(mixture.pieces[0].weights), dtype=np.int64)
            for first, end in passed_over:
                lost += mixture.counts(before(end)) - mixture.counts(before(first))
            return lost

        own = inside(self._own.mixture, self.record.own_before)
        if self.record.replay is None:
            return own, np.empty(0, dtype=np.int64)
        return own, inside(self._replay_mixture, self.record.replayed_before)

    def repeats(self) -> list[str]:
        """What will have been read twice by the phase's end, a line each: sources, and phases that are replayed."""
        whole = self.seen(self.record.budget_samples, self.record.last_lr)
        lines = [
            f"phase {whole.name!r}: by its end the model has read source {source.name!r} {source.epochs:.2f} times over"
            for source in whole.sources_read
            if source.epochs > 1
        ]
        lines += [
            f"phase {whole.name!r} reads source {source.name!r} in an order of its own, of which the model has read "
            f"{source.tokens_before:,} tokens in another (other generation, seed, seq_length, packing): some come again"
            for source in whole.sources_read
            if source.tokens_before and not source.first and source.epochs <= 1
        ]
        after = self._lineage.with_phase(whole)
        for entry in whole.replay.from_ if whole.replay else ():
            times = times_replayed(after, entry.phase)
            if entry.samples and times > 1:
                lines.append(
                    f"phase {whole.name!r}: by its end phase {entry.phase!r} is replayed {times:.2f} times over"
                )
        return lines
