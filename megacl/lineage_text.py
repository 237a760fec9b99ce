"""A lineage as readable text: `megacl lineage MODEL`."""

from collections.abc import Iterator

from megacl.lineage import (
    BranchRecord,
    CheckpointMark,
    ConversionRecord,
    Event,
    Lineage,
    PhaseRecord,
    SourceRecord,
    VocabularyRecord,
)


def describe(lineage: Lineage) -> str:
    """The lineage as readable text: a paragraph a phase, branch, merge or conversion."""
    lines: list[str] = []
    number = 0
    for own, entry in zip(lineage.ids, lineage.entries, strict=True):
        if isinstance(entry, PhaseRecord):
            lines.append(f"phase {number}  {entry.name}  (run {entry.run})  id {own[:12]}")
            lines += [f"  {line}" for line in _describe_phase(entry)]
            number += 1
        else:
            head, *details = describe_event(entry)
            lines.append(f"{head}  id {own[:12]}")
            lines += [f"  {line}" for line in details]
    lines.append(f"{lineage.tokens:,} tokens in all")
    return "\n".join(lines)


def describe_event(event: Event) -> list[str]:
    """What happened between two phases: a line that says it, and what it was made of, a line each."""
    if isinstance(event, BranchRecord):
        return [f"branch from {_describe_mark(event.checkpoint)}"]
    if isinstance(event, ConversionRecord):
        lines = [f"conversion  from {event.from_} to {event.to}, of {event.name}"]
        if event.checkpoint:
            lines.append(_describe_mark(event.checkpoint))
        lines += [f"file {name}, SHA-256 {digest[:12]}" for name, digest in event.files.items()]
        return [*lines, *event.notes]
    if isinstance(event, VocabularyRecord):
        new = event.tokens - event.tokens_before
        return [
            f"vocabulary  {event.tokens_before:,} tokens and {new:,} new ones, in {event.rows:,} rows of which there "
            f"were {event.rows_before:,}",
            f"new rows: {event.from_pieces:,} the mean of the pieces that spelled them before, "
            f"{new - event.from_pieces:,} the mean of all tokens",
            f"tokenizer {event.tokenizer[:12]}, which extends {event.tokenizer_before[:12]}",
        ]
    head = f"merge  {event.name}  of {len(event.checkpoints)} checkpoints, shape {event.shape}"
    return [head, *(f"{mark.weight:.4g} of {_describe_mark(mark)}" for mark in event.checkpoints)]


def _describe_mark(mark: CheckpointMark) -> str:
    return f"{mark.run}@{mark.step}, {mark.tokens:,} tokens, lineage {mark.id[:12]}, weights {mark.weights[:12]}"


def _describe_phase(phase: PhaseRecord) -> Iterator[str]:
    packed = "packed " if phase.packing == "best_fit" else ""
    state = "" if phase.samples == phase.budget_samples else f" of {phase.budget_samples * phase.seq_length:,}"
    yield (
        f"{phase.tokens:,}{state} tokens in {phase.samples:,} {packed}sequences of {phase.seq_length}, "
        f"{phase.global_batch_size} a step, seed {phase.seed}, order {phase.order}"
    )
    peak = phase.schedule.get("max_lr")
    yield (
        f"schedule {phase.schedule['kind']}, peak {peak}, from {phase.start_lr:.3g} to {phase.last_lr:.3g}; "
        f"optimizer state {phase.optimizer_state}"
    )
    if phase.reptile:
        yield phase.reptile.words
    if phase.passed_over:
        passed_over = phase.samples - phase.learned_samples
        yield f"passed over {passed_over:,} of these sequences, in {len(phase.passed_over):,} places"
    yield from describe_mixture(phase)
    for source in phase.sources:
        out = "" if source.runs_out is None else f"; would run out at step {phase.step_of(source.runs_out):,}"
        yield "read " + _describe_source(source) + out
    if phase.replay:
        part = f"{float(phase.replay.fraction):.4g} of each batch, {phase.replay.samples:,} sequences"
        yield f"replayed {part}, policy {phase.replay.policy}"
        for replayed in phase.replay.from_:
            yield (
                f"  {replayed.samples:,} sequences ({replayed.tokens:,} tokens) of phase {replayed.phase}, "
                f"draws {replayed.first:,} to {replayed.first + replayed.samples:,}"
                + ("" if replayed.runs_out is None else f"; up to step {phase.step_of(replayed.runs_out):,}")
            )
        for source in phase.replay.from_sources:
            yield "  " + _describe_source(source)


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
