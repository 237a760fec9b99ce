"""The record of a phase as it begins: what it will read and replay, from where on, and how far that goes.

    record = plan_phase(lineage, phase, sources, seq_length=2048, global_batch_size=64, steps=1000, ...)
    record.budget_samples       # fewer than steps x batch where a source that runs out ends the phase

All that follows from the configuration and the data is settled here, once: weights become integers, changes of the
mixture become numbers of samples, and sources that run out are found by halving over counts. The record then says it
all, and a later state of the data does not move it.

A source goes on where the last phase that read it (in the same cut and under the same seed) stopped, so that nothing is
seen twice before everything was seen once; a replay goes on where the last replay of that phase stopped. A phase that
`continues` the one before also takes over its mixture and its places for replays, in the middle of their patterns: it
reads what that one would have read next.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from megacl.config_phase import PhaseConfig, ReplayConfig, length_in_steps, share_of
from megacl.data.mixture import MAX_LINE, Mixture, first_to_run_out, integer_weights, pieces_since, renormalised
from megacl.data.replay import draws_in_a_round, next_draw, policy_weights
from megacl.data.sequences import build_sequences
from megacl.data.source import Source
from megacl.errors import ConfigError, DataError
from megacl.lineage import (
    Lineage,
    MixtureLine,
    MixturePiece,
    OptimizerState,
    PhaseRecord,
    ReplayedPhase,
    ReplayRecord,
    SourceRecord,
)


def plan_phase(
    lineage: Lineage,
    phase: PhaseConfig,
    sources: Mapping[str, Source],
    *,
    run: str,
    seed: int,
    seq_length: int,
    packing: Literal["cut", "best_fit"] = "cut",
    global_batch_size: int,
    steps: int,
    schedule: dict[str, Any],
    optimizer_state: OptimizerState,
    start_lr: float,
) -> PhaseRecord:
    """The record of a phase that begins after `lineage`, with nothing seen yet.

    sources: opened sources by name, all that the phase's mixtures and its replay name. steps: the configured budget.
    Raises ConfigError where the phase cannot follow this lineage or has nothing left to read, DataError where a source
    or a replayed phase is too small for one sequence.
    """
    if phase.name in lineage.names:
        raise ConfigError(
            f"the model has already been through a phase or a merge named {phase.name!r}; give this one another name."
        )
    before = None
    if phase.continues:
        before = lineage.phases[-1]
        _check_continued(before, phase, sources, seed, seq_length, packing)
    names = tuple(source.name for source in before.sources) if before else phase.source_names
    _check_names(phase, names, sources)
    share = share_of(phase.replay.share) if phase.replay else Fraction(0)
    places = _Places(share, global_batch_size)
    if before and before.replay:
        places = replace(places, shift=before.replay.shift + before.samples)
    records = {
        name: _source_record(lineage, name, sources[name], seq_length, packing, seed)
        for name in (*names, *((phase.replay.from_sources or ()) if phase.replay else ()))
    }
    own = tuple(records[name] for name in names)
    if before:
        pieces = pieces_since(before.mixture, before.own_before(before.samples))
    else:
        pieces = _pieces(phase, sources, steps, seq_length, places)
    out: dict[int, int] = {}
    if phase.when_exhausted != "repeat":
        built = [build_sequences(sources[r.name], seq_length, seed, r.window, packing) for r in own]
        left = [max(0, cut.n - record.first) for cut, record in zip(built, own, strict=True)]
        pieces, steps, out = _until_exhausted(phase, names, pieces, left, steps, places)
    own_samples = places.own(steps * global_batch_size)
    counts = Mixture(pieces).counts(own_samples).tolist()
    replay = None
    if phase.replay and share:
        replay = _plan_replay(lineage, phase, phase.replay, records, seq_length, places, steps)
    return PhaseRecord(
        run=run,
        name=phase.name,
        order="v1",
        seed=seed,
        seq_length=seq_length,
        packing=packing,
        global_batch_size=global_batch_size,
        budget_samples=steps * global_batch_size,
        tokenizer=sources[names[0]].tokenizer_fingerprint,
        sources=tuple(
            replace(
                record,
                share=count / own_samples if own_samples else 0.0,
                runs_out=places.sample_of(out[index]) if index in out else None,
            )
            for index, (record, count) in enumerate(zip(own, counts, strict=True))
        ),
        mixture=pieces,
        replay=replay,
        schedule=schedule,
        optimizer_state=optimizer_state,
        reptile=phase.reptile,
        start_lr=start_lr,
        last_lr=start_lr,
    )


def _check_continued(
    before: PhaseRecord,
    phase: PhaseConfig,
    sources: Mapping[str, Source],
    seed: int,
    seq_length: int,
    packing: str,
) -> None:
    """Raises ConfigError or DataError where `phase` cannot go on with the samples of the phase before it."""
    cut = {"seq_length": seq_length, "packing": packing, "seed": seed}
    for key, now in cut.items():
        was = getattr(before, key)
        if was != now:
            raise ConfigError(
                f"phase {phase.name!r} continues {before.name!r}, whose {key} is {was}, and its own is {now}; use that "
                "value, or give it a mixture of its own."
            )
    replay = phase.replay if phase.replay and share_of(phase.replay.share) else None
    named = tuple(source.name for source in before.replay.from_sources) if before.replay else ()
    was = before.replay and (before.replay.fraction, before.replay.policy, named)
    if was != (replay and (share_of(replay.share), replay.policy, tuple(replay.from_sources or ()))):
        spelled = f"share {was[0]}, policy {was[1]}" + f", from {', '.join(named)}" * bool(named) if was else "none"
        raise ConfigError(
            f"phase {phase.name!r} continues {before.name!r}, and its replay differs from that phase's ({spelled}); "
            "give it the same."
        )
    for record in before.sources_read:
        source = sources.get(record.name)
        if source is None or (source.fingerprint, source.window) != (record.fingerprint, record.window):
            raise DataError(
                f"phase {phase.name!r} continues {before.name!r}, which reads source {record.name!r}, fingerprint "
                f"{record.fingerprint[:12]}, window {record.window}, and sources has "
                + ("none of that name" if source is None else f"{source.fingerprint[:12]}, window {source.window}")
                + f"; name {record.path}, generation {record.generation}, there."
            )


def _check_names(phase: PhaseConfig, mixed: Sequence[str], sources: Mapping[str, Source]) -> None:
    replayed = (phase.replay.from_sources or ()) if phase.replay else ()
    for names in (mixed, replayed):
        first_of: dict[str, str] = {}
        for name in names:
            twin = first_of.setdefault(sources[name].fingerprint, name)
            if twin != name:
                raise ConfigError(
                    f"phase {phase.name!r} reads the same data twice, as {twin!r} and {name!r}; one weight says it all."
                )
    for name in replayed:
        twins = [other for other in mixed if sources[other].fingerprint == sources[name].fingerprint]
        if twins:
            raise ConfigError(
                f"phase {phase.name!r} replays source {name!r}, and its mixture reads the same data as {twins[0]!r}; "
                "take it out of one of them."
            )


def _source_record(
    lineage: Lineage, name: str, source: Source, seq_length: int, packing: str, seed: int
) -> SourceRecord:
    """A source as a phase begins with it, under its name in the configuration."""
    return SourceRecord(
        name=name,
        path=str(source.path),
        generation=source.generation,
        since=source.since,
        window=source.window,
        fingerprint=source.fingerprint,
        train_tokens=source.train.tokens,
        first=_draws_taken(lineage, source, seq_length, packing, seed),
        tokens_before=_tokens_read(lineage, source),
    )


def _draws_taken(lineage: Lineage, source: Source, seq_length: int, packing: str, seed: int) -> int:
    """How many draws from a source, in this cut or packing and order, the model has seen."""
    taken = 0
    for phase in lineage.phases:
        if (phase.seq_length, phase.packing, phase.seed) == (seq_length, packing, seed):
            for record in phase.sources_read:
                if (record.fingerprint, record.window) == (source.fingerprint, source.window):
                    taken = max(taken, record.first + record.samples)
    return taken


def _tokens_read(lineage: Lineage, source: Source) -> int:
    """How many tokens the model has learned from a source's folder, in any cut, order and generation."""
    return sum(
        record.tokens
        for phase in lineage.phases
        for record in phase.sources_read
        if record.fingerprint == source.fingerprint or record.path == str(source.path)
    )


# ---------------------------------------------------------------------------------------------- the mixture


@dataclass(frozen=True)
class _Places:
    """Where a phase's own samples stand among all of its samples."""

    share: Fraction
    """The part that is replayed."""
    batch_size: int
    shift: int = 0
    """Samples of the phase that it continues, from whose first one the places are counted."""

    def replayed(self, samples: int) -> int:
        """How many of the first `samples` samples are replayed ones."""
        return math.floor((samples + self.shift) * self.share) - math.floor(self.shift * self.share)

    def own(self, samples: int) -> int:
        """How many of the first `samples` samples are the phase's own: ceil(samples (1 - share)) with no shift."""
        return samples - self.replayed(samples)

    def sample_of(self, number: int) -> int:
        """The index in the phase of its own sample of that number."""
        return math.floor((number + math.ceil(self.shift * (1 - self.share))) / (1 - self.share)) - self.shift

    def replayed_sample_of(self, number: int) -> int:
        """The index in the phase of its replayed sample of that number."""
        return math.ceil((number + 1 + math.floor(self.shift * self.share)) / self.share) - 1 - self.shift

    def whole_steps(self, own_samples: int, steps: int) -> int:
        """How many of `steps` steps need no more than so many own samples."""
        return min(steps, self.sample_of(own_samples) // self.batch_size)


def asked_weights(
    phase: PhaseConfig, mixture: Mapping[str, float], sources: Mapping[str, Source]
) -> dict[str, float | Fraction]:
    """The weights of one of a phase's mixtures before they become integers.

    w_i^(1 / temperature), w_i being the number given, times the source's training tokens or training documents where
    weights_by says so. Exact at temperature 1.
    """
    weights = {}
    for name, given in mixture.items():
        source = sources[name]
        size = {"given": 1, "tokens": source.train.tokens, "documents": source.train.documents}[phase.weights_by]
        if not size:
            raise DataError(f"source {name!r} ({source.path}) has no training documents; prepare more of them.")
        weights[name] = Fraction(repr(given)) * size
    if phase.temperature == 1:
        return dict(weights)
    largest = max(weights.values())
    return {name: max(float(w / largest) ** (1 / phase.temperature), 1e-300) for name, w in weights.items()}


def _pieces(
    phase: PhaseConfig, sources: Mapping[str, Source], steps: int, seq_length: int, places: _Places
) -> tuple[MixturePiece, ...]:
    """The phase's mixture and its changes over the numbers of its own samples, aligned with `phase.source_names`.

    Also what comes at the phase's end or behind it, which a phase that continues this one reads.
    """

    def weights(mixture: Mapping[str, float]) -> tuple[int, ...]:
        whole = integer_weights(asked_weights(phase, mixture, sources))
        return tuple(whole.get(name, 0) for name in phase.source_names)

    pieces = [MixturePiece(first=0, weights=weights(phase.mixture))]
    for change in phase.mixture_changes:
        length = length_in_steps(change.at, phase_steps=steps, tokens_per_step=seq_length * places.batch_size)
        begin, end = pieces[-1].first, places.own(math.ceil(length) * places.batch_size)
        new = weights(change.mixture)
        if end == begin:  # where most is replayed, some steps hold no new sample
            pieces[-1] = MixturePiece(first=begin, weights=new)
            continue
        if change.how == "linear":
            if end - begin >= MAX_LINE:
                raise ConfigError(
                    f"phase {phase.name!r} changes its mixture over {end - begin:,} samples; a straight line may have "
                    f"{MAX_LINE - 1:,} at most, so set a change in between, or step."
                )
            pieces[-1] = replace(pieces[-1], line=MixtureLine(weights=new, start=begin, end=end))
        pieces.append(MixturePiece(first=end, weights=new))
    return tuple(pieces)


def _before(pieces: tuple[MixturePiece, ...], samples: int) -> tuple[MixturePiece, ...]:
    """The pieces that begin within the first `samples` samples, and the first one where there are none."""
    return (pieces[0], *(piece for piece in pieces[1:] if piece.first < samples))


def _until_exhausted(
    phase: PhaseConfig,
    names: Sequence[str],
    pieces: tuple[MixturePiece, ...],
    left: Sequence[int],
    steps: int,
    places: _Places,
) -> tuple[tuple[MixturePiece, ...], int, dict[int, int]]:
    """(pieces, steps, the own sample with which each source runs out) under `when_exhausted: stop` or `renormalise`.

    names: of the sources. left: draws that each source has left. Raises ConfigError where not one batch is left.
    """
    samples = places.own(steps * places.batch_size)
    if phase.when_exhausted == "stop":
        found = first_to_run_out(Mixture(pieces), left, samples)
        end, out = (found[0], {found[1]: found[0]}) if found else (samples, {})
    else:
        pieces, end, out = renormalised(pieces, left, samples)
    steps = places.whole_steps(end, steps)
    if steps == 0:
        unread = ", ".join(f"{left[index]:,} sequences of {names[index]}" for index in out)
        raise ConfigError(
            f"phase {phase.name!r} ends before its first batch is full: the model has yet to read {unread}. "
            "Change the mixture, prepare more, or set when_exhausted to repeat."
        )
    return pieces, steps, out


# ---------------------------------------------------------------------------------------------- its replay


def _plan_replay(
    lineage: Lineage,
    phase: PhaseConfig,
    replay: ReplayConfig,
    records: Mapping[str, SourceRecord],
    seq_length: int,
    places: _Places,
    steps: int,
) -> ReplayRecord:
    """What a phase of so many steps replays."""
    samples = places.replayed(steps * places.batch_size)
    before = lineage.phases[-1] if phase.continues else None
    going_on = before.replay if before else None
    if replay.from_sources:
        whole = integer_weights(replay.from_sources)
        pieces: tuple[MixturePiece, ...] = (MixturePiece(first=0, weights=tuple(whole.values())),)
        if before and going_on:
            pieces = pieces_since(going_on.mixture, before.replayed_before(before.samples))
        counts = Mixture(pieces).counts(samples).tolist()
        return ReplayRecord(
            share=str(places.share),
            mixture=pieces,
            shift=places.shift,
            from_sources=tuple(
                replace(records[source], share=count / samples if samples else 0.0)
                for source, count in zip(whole, counts, strict=True)
            ),
        )
    draws = {earlier.name: draws_in_a_round(earlier, seq_length) for earlier in lineage.phases}
    if before and going_on:
        names = [entry.phase for entry in going_on.from_]
        pieces = _before(pieces_since(going_on.mixture, before.replayed_before(before.samples)), samples)
    else:
        weights = replay.from_ or policy_weights(replay, lineage, _replayable(phase.name, draws))
        _check_replayed(phase.name, [*weights], lineage, draws, seq_length)
        whole = integer_weights(weights)
        names, pieces = [*whole], (MixturePiece(first=0, weights=tuple(whole.values())),)
    permuted = replay.policy == "uniform"
    entries = tuple(
        ReplayedPhase(phase=name, first=next_draw(lineage, name, permuted=permuted, seq_length=seq_length))
        for name in names
    )
    if replay.max_times:
        left = [max(0, replay.max_times * draws[entry.phase] - entry.first) for entry in entries]
        pieces, end, out = renormalised(pieces, left, samples)
        if end < samples:
            raise ConfigError(
                f"phase {phase.name!r} replays {samples:,} samples, and with replay.max_times {replay.max_times} there "
                f"are {sum(left):,} left to replay; lower replay.share, or raise max_times."
            )
        pieces = _before(pieces, samples)
        entries = tuple(
            replace(entry, runs_out=places.replayed_sample_of(out[index])) if index in out else entry
            for index, entry in enumerate(entries)
        )
    return ReplayRecord(
        share=str(places.share), policy=replay.policy, mixture=pieces, shift=places.shift, from_=entries
    )


def _check_replayed(
    name: str, replayed: Sequence[str], lineage: Lineage, draws: Mapping[str, int], seq_length: int
) -> None:
    """Raises ConfigError or DataError where phase `name` cannot replay these."""
    earlier = {phase.name: phase for phase in lineage.phases}
    for phase in replayed:
        if phase not in draws:
            known = (
                f"it knows {', '.join(draws)}."
                if draws
                else ("its history names no phase. Name prepared sources in replay.from_sources instead.")
            )
            raise ConfigError(f"phase {name!r} replays {phase!r}, which the model has not been through; {known}")
        _check_recut(name, earlier[phase], seq_length)
        if not draws[phase]:
            raise DataError(
                f"phase {phase!r} saw too few tokens of its own to replay one sequence of {seq_length}; "
                "take it out of replay.from."
            )


def _check_recut(name: str, earlier: PhaseRecord, seq_length: int) -> None:
    if earlier.packing == "best_fit" and earlier.seq_length != seq_length:
        raise ConfigError(
            f"phase {name!r} replays {earlier.name!r}, whose sequences of {earlier.seq_length} are packed and cannot "
            f"be cut to {seq_length}; give this phase seq_length {earlier.seq_length}, or name others in replay.from, "
            "under policy original."
        )


def _replayable(name: str, draws: Mapping[str, int]) -> list[str]:
    """The phases that have a sequence of their own to replay, oldest first."""
    names = [phase for phase, count in draws.items() if count]
    if not names:
        raise ConfigError(
            f"phase {name!r} has nothing to replay: the model's history names no phase with a sequence of its own. "
            "Take replay out, or name prepared sources in replay.from_sources."
        )
    return names
