"""The samples of a phase: index g -> tokens, a pure function of the lineage.

    record = plan_phase(lineage, phase, sources, ...)       # where each source's cursor and each replay's cursor stands
    stream = PhaseStream(lineage.with_phase(record), open_source)
    tokens = stream.read(np.arange(64))                     # int64 [64, T + 1]

A source goes on where the last phase that read it (in the same cut and under the same seed) stopped, so that nothing is
seen twice before everything was seen once; a replay goes on where the last replay of that phase stopped.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megacl.config_phase import PhaseConfig, ReplayConfig, share_of
from megacl.data.mixture import Mixture, integer_weights
from megacl.data.order import Int64
from megacl.data.replay import Recut, is_replayed, replayed_before
from megacl.data.sequences import Sequences
from megacl.data.shards import Source, open_source
from megacl.errors import ConfigError, DataError
from megacl.lineage import Lineage, PhaseRecord, ReplayedPhase, ReplayRecord, SourceRecord

OpenSource = Callable[[SourceRecord], Source]


def open_recorded(record: SourceRecord, known: Iterable[Source] = ()) -> Source:
    """The source that a lineage names, from `known` or from where it lay; DataError where that is other data now."""
    for source in known:
        if source.fingerprint == record.fingerprint:
            return source
    try:
        source = open_source(record.path, record.generation, record.since)
    except DataError as error:
        raise DataError(
            f"the model's history reads source {record.name!r}, fingerprint {record.fingerprint[:12]}, which is gone: "
            f"{error} If it lies elsewhere now, name that folder in sources."
        ) from None
    if source.fingerprint != record.fingerprint:
        raise DataError(
            f"{record.path}: generation {record.generation} has fingerprint {source.fingerprint[:12]}, but the model "
            f"was trained on {record.fingerprint[:12]}; restore the data that source {record.name!r} had."
        )
    return source


# ---------------------------------------------------------------------------------------------- planning a phase


def plan_phase(
    lineage: Lineage,
    phase: PhaseConfig,
    sources: Mapping[str, Source],
    *,
    run: str,
    seed: int,
    seq_length: int,
    global_batch_size: int,
    steps: int,
    schedule: dict[str, Any],
    optimizer_state: Literal["new", "kept", "reset"],
    start_lr: float,
) -> PhaseRecord:
    """The record of a phase that begins after `lineage`, with nothing seen yet.

    sources: opened sources by name, all that the phase's mixture and its replay name. Raises ConfigError where the
    phase cannot follow this lineage, DataError where a source is too small for one sequence.
    """
    if phase.name in {earlier.name for earlier in lineage.phases}:
        raise ConfigError(
            f"the model has already been through a phase named {phase.name!r}; give this one a name of its own."
        )
    replay = phase.replay
    named = [*phase.mixture, *(replay.from_sources or {} if replay else {})]
    first_of: dict[str, str] = {}
    for name in named:
        twin = first_of.setdefault(sources[name].fingerprint, name)
        if named.count(name) > 1 or twin != name:
            raise ConfigError(
                f"phase {phase.name!r} reads the same data twice, as {twin!r} and {name!r}; one weight says it all."
            )

    def records(weights: Mapping[str, float]) -> tuple[SourceRecord, ...]:
        whole = integer_weights(weights)
        period = sum(whole.values())
        return tuple(
            SourceRecord(
                name=name,
                path=str(sources[name].path),
                generation=sources[name].generation,
                since=sources[name].since,
                fingerprint=sources[name].fingerprint,
                train_tokens=sources[name].train.tokens,
                weight=weight,
                share=weight / period,
                first=_draws_taken(lineage, sources[name].fingerprint, seq_length, seed),
                tokens_before=_tokens_read(lineage, sources[name]),
            )
            for name, weight in whole.items()
        )

    return PhaseRecord(
        run=run,
        name=phase.name,
        order="v1",
        seed=seed,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        budget_samples=steps * global_batch_size,
        tokenizer=sources[next(iter(phase.mixture))].tokenizer_fingerprint,
        sources=records(phase.mixture),
        replay=_plan_replay(lineage, phase.name, replay, records) if replay and replay.share else None,
        schedule=schedule,
        optimizer_state=optimizer_state,
        start_lr=start_lr,
        last_lr=start_lr,
    )


def _draws_taken(lineage: Lineage, fingerprint: str, seq_length: int, seed: int) -> int:
    """How many draws from a source, in this cut and order, the model has seen."""
    taken = 0
    for phase in lineage.phases:
        if (phase.seq_length, phase.seed) == (seq_length, seed):
            for source in phase.sources_read:
                if source.fingerprint == fingerprint:
                    taken = max(taken, source.first + source.samples)
    return taken


def _tokens_read(lineage: Lineage, source: Source) -> int:
    """How many tokens the model has learned from a source's folder, in any cut, order and generation."""
    return sum(
        record.tokens
        for phase in lineage.phases
        for record in phase.sources_read
        if record.fingerprint == source.fingerprint or record.path == str(source.path)
    )


def _plan_replay(
    lineage: Lineage,
    name: str,
    replay: ReplayConfig,
    records: Callable[[Mapping[str, float]], tuple[SourceRecord, ...]],
) -> ReplayRecord:
    share = str(share_of(replay.share))
    if replay.from_sources:
        return ReplayRecord(share=share, from_sources=records(replay.from_sources))
    own = {phase.name: phase.own_samples * phase.seq_length for phase in lineage.phases if phase.own_samples}
    weights: Mapping[str, float] = replay.from_ or own
    if not weights:
        raise ConfigError(
            f"phase {name!r} has nothing to replay: the model's history names no phase. "
            "Take replay out, or name prepared sources in replay.from_sources."
        )
    for phase in weights:
        if phase not in own:
            raise ConfigError(
                f"phase {name!r} replays {phase!r}, which the model has not been through; it knows {', '.join(own)}."
            )
    return ReplayRecord(
        share=share,
        from_=tuple(
            ReplayedPhase(phase=phase, weight=weight, first_token=_tokens_replayed(lineage, phase))
            for phase, weight in integer_weights(weights).items()
        ),
    )


def _tokens_replayed(lineage: Lineage, phase: str) -> int:
    """How many tokens of a phase the phases after it have replayed."""
    replays = [record.replay for record in lineage.phases if record.replay]
    return sum(replayed.tokens for replay in replays for replayed in replay.from_ if replayed.phase == phase)


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
    """Where in the source's training stream the sample's first token lies."""


@dataclass(frozen=True)
class _OwnSamples:
    """A phase's own samples, those that are not replayed, by their number."""

    cuts: tuple[Sequences, ...]
    firsts: Int64
    numbers: Int64
    """The sources' places in the stream's list."""
    mixture: Mixture

    def locate(self, samples: Int64) -> tuple[Int64, Int64]:
        """(index among this phase's sources, start) of own samples, int64 [N]."""
        source, draw = self.mixture.locate(samples)
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
        tokens = np.empty((samples.size, self.cuts[0].seq_length + 1), dtype=np.int64)
        for index, cut in enumerate(self.cuts):
            mine = np.flatnonzero(source == index)
            if mine.size:
                tokens[mine] = cut.read(starts[mine])
        return tokens


@dataclass(frozen=True)
class _Replayed:
    """An earlier phase that is replayed."""

    index: int
    own: _OwnSamples
    recut: Recut
    first: int
    """The piece at which this phase's replay of it begins."""


class PhaseStream:
    """The samples of a lineage's last phase, by index g in [0, budget). Holds open files and nothing else."""

    def __init__(self, lineage: Lineage, open_source: OpenSource) -> None:
        """open_source: gives the opened source of a record; `open_recorded` is the usual one."""
        self.record = lineage.phases[-1]
        self._index = len(lineage.phases) - 1
        self.sources: list[Source] = []
        self._open = open_source
        self._numbers: dict[str, int] = {}
        record = self.record
        self._own = self._samples_of(record, record.sources)
        self._replayed_phases: list[_Replayed] = []
        self._replayed_sources: _OwnSamples | None = None
        if record.replay is None:
            return
        self._replay_mixture = Mixture(
            tuple(entry.weight for entry in record.replay.from_ or record.replay.from_sources)
        )
        by_name = {phase.name: index for index, phase in enumerate(lineage.phases[:-1])}
        for entry in record.replay.from_:
            earlier = lineage.phases[by_name[entry.phase]]
            own = self._samples_of(earlier, earlier.sources)
            recut = Recut(own.read, earlier.own_samples, earlier.seq_length, record.seq_length)
            if recut.n < 1:
                raise DataError(
                    f"phase {entry.phase!r} saw {earlier.own_samples * earlier.seq_length} tokens of its own, too few "
                    f"to replay one sequence of {record.seq_length}; take it out of replay.from."
                )
            first = -(-entry.first_token // record.seq_length)
            self._replayed_phases.append(_Replayed(by_name[entry.phase], own, recut, first))
        if record.replay.from_sources:
            self._replayed_sources = self._samples_of(record, record.replay.from_sources)

    def _samples_of(self, phase: PhaseRecord, records: tuple[SourceRecord, ...]) -> _OwnSamples:
        numbers = []
        for source in records:
            if source.fingerprint not in self._numbers:
                self._numbers[source.fingerprint] = len(self.sources)
                self.sources.append(self._open(source))
            numbers.append(self._numbers[source.fingerprint])
        return _OwnSamples(
            cuts=tuple(Sequences(self.sources[number], phase.seq_length, phase.seed) for number in numbers),
            firsts=np.array([source.first for source in records], dtype=np.int64),
            numbers=np.array(numbers, dtype=np.int64),
            mixture=Mixture(tuple(source.weight for source in records)),
        )

    @property
    def seq_length(self) -> int:
        """T: tokens that a sample predicts."""
        return self.record.seq_length

    def _parts(self, samples: Int64) -> tuple[NDArray[np.bool_], Int64]:
        """Which samples are replayed ones, and each one's number among its kind."""
        replay = self.record.replay
        if replay is None:
            return np.zeros(samples.shape, dtype=np.bool_), samples
        before = replayed_before(samples, replay.fraction)
        replayed = is_replayed(samples, replay.fraction)
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
        """Tokens, int64 [N, T + 1], of samples, int64 [N] in [0, budget)."""
        replayed, number = self._parts(samples)
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
                yield which, replayed_phase, (replayed_phase.first + number[which]) % replayed_phase.recut.n

    def seen(self, samples: int, last_lr: float) -> PhaseRecord:
        """The phase's record after its first `samples` samples, of which the last was learned at rate `last_lr`."""
        record = dataclasses.replace(self.record, samples=samples, tokens=samples * self.seq_length, last_lr=last_lr)
        sources = self._counted(record.sources, self._own, record.own_samples)
        replay = record.replay
        if replay is not None:
            replayed = record.replayed_samples
            counts = self._replay_mixture.counts(replayed) if self._replayed_phases else ()
            replay = dataclasses.replace(
                replay,
                samples=replayed,
                from_=tuple(
                    dataclasses.replace(entry, samples=int(count), tokens=int(count) * self.seq_length)
                    for entry, count in zip(replay.from_, counts, strict=True)
                ),
                from_sources=self._counted(replay.from_sources, self._replayed_sources, replayed)
                if self._replayed_sources
                else (),
            )
        return dataclasses.replace(record, sources=sources, replay=replay)

    def _counted(self, records: tuple[SourceRecord, ...], samples: _OwnSamples, total: int) -> tuple[SourceRecord, ...]:
        return tuple(
            dataclasses.replace(
                record,
                samples=int(count),
                tokens=int(count) * self.seq_length,
                epochs=(record.tokens_before + int(count) * self.seq_length) / (cut.n * self.seq_length),
            )
            for record, cut, count in zip(records, samples.cuts, samples.mixture.counts(total), strict=True)
        )

    def repeats(self) -> list[str]:
        """What will have been read twice by the phase's end, a line each: sources, and phases that are replayed."""
        whole = self.seen(self.record.budget_samples, self.record.last_lr)
        replay = whole.replay
        lines = [
            f"phase {whole.name!r}: by its end the model has read source {source.name!r} {source.epochs:.2f} times over"
            for source in whole.sources_read
            if source.epochs > 1
        ]
        lines += [
            f"phase {whole.name!r} reads source {source.name!r} in an order of its own, of which the model has read "
            f"{source.tokens_before:,} tokens in another (other generation, seed or seq_length): some come again"
            for source in whole.sources_read
            if source.tokens_before and not source.first and source.epochs <= 1
        ]
        if replay:
            for entry, replayed_phase in zip(replay.from_, self._replayed_phases, strict=True):
                rounds = (replayed_phase.first + entry.samples) / replayed_phase.recut.n
                if rounds > 1:
                    lines.append(f"phase {whole.name!r} replays phase {entry.phase!r} {rounds:.2f} times over")
        return lines
