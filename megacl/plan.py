"""What a run will do, worked out before it starts: said by `megacl train CONFIG --dry-run`, checked by every start.

    for index, stream, after in plan_phases(found):    # each phase that is left: its samples, the lineage after it
        print(notices(found.config, index, stream))
    run_phases(after, config)                          # the records of all phases of the run, those that are over too

A phase's record, schedule and samples are made here, by the same functions for a dry run, for `megacl data plan` and
for training.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from megacl.checkpoint import newest_checkpoint
from megacl.config import RunConfig
from megacl.config_phase import AnnealSchedule, PhaseConfig, length_in_steps, misfit, share_of
from megacl.configfile import to_tree
from megacl.data.mixture import integer_weights
from megacl.data.planning import asked_weights, plan_phase
from megacl.data.provide import missing_sources
from megacl.data.replay import times_replayed
from megacl.data.source import Source
from megacl.data.store import RemoteFolder
from megacl.data.stream import PhaseStream, open_recorded
from megacl.engine import Device, check_engine, device_here
from megacl.errors import ConfigError, DataError
from megacl.lineage import (
    ConversionRecord,
    Lineage,
    OptimizerState,
    PhaseRecord,
    SourceRecord,
    VocabularyRecord,
)
from megacl.lineage_text import describe_event, describe_mixture
from megacl.model.gpt import count_parameters, flops_per_token
from megacl.parallel.ranks import check_groups
from megacl.plan_memory import Machine, memory_lines
from megacl.resume import Found, Inputs, Origin, find_inputs, find_origin, open_sources
from megacl.schedules import Schedule, build_schedule, peak

_WHAT_BECAME: dict[str, OptimizerState] = {"keep": "kept", "reset": "reset", "reset_step": "step_reset"}
"""Of the optimizer's state, by what is asked for: a verb in the configuration, a participle in the lineage."""


def begin_phase(config: RunConfig, index: int, lineage: Lineage, sources: Mapping[str, Source]) -> PhaseRecord:
    """The record of the configuration's phase `index` as it begins after `lineage`. Raises as `plan_phase` does."""
    phase = config.phases[index]
    if not lineage.phases:
        _check_first(index, phase)
    asked = phase.optimizer_state or ("keep" if phase.schedule.keeps_optimizer_state else "reset")
    record = plan_phase(
        lineage,
        phase,
        sources,
        run=Path(config.run_dir).name,
        seed=config.seed,
        seq_length=config.seq_length_of(phase),
        packing=config.packing,
        global_batch_size=config.batch_size_of(phase),
        steps=config.steps_of(phase),
        schedule=to_tree(phase.schedule),
        optimizer_state=_WHAT_BECAME[asked] if lineage.phases else "new",
        start_lr=lineage.phases[-1].last_lr if lineage.phases else 0.0,
    )
    if record.budget_steps < config.steps_of(phase):
        per_step = config.tokens_per_step(phase)
        if problem := misfit(phase.schedule, phase_steps=record.budget_steps, tokens_per_step=per_step):
            raise ConfigError(f"{_end_of(config, index, record)}. There phases[{index}].schedule{problem}")
    return record


def _check_first(index: int, phase: PhaseConfig) -> None:
    """Raises ConfigError where a phase goes on with another one, and the model's history has none."""
    if phase.continues:
        raise ConfigError(
            f"phases[{index}].continues is true, and the model's history names no phase to go on with; give a mixture."
        )
    rates = [getattr(phase.schedule, key, None) for key in ("max_lr", "constant_lr", "min_lr")]
    if "last" in rates:
        raise ConfigError(
            f"phases[{index}].schedule goes on with the last phase's rate, and the model's history names no phase; "
            "give a number."
        )


def schedule_of(config: RunConfig, phase: PhaseConfig, start_lr: float, steps: int) -> Schedule:
    """The learning rate of a phase's updates; start_lr: the rate at which the phase before ended."""
    return build_schedule(phase.schedule, steps=steps, tokens_per_step=config.tokens_per_step(phase), last_lr=start_lr)


def peak_of(phase: PhaseConfig, lineage: Lineage) -> float:
    """The highest rate of a phase's schedule, the lineage's last; an anneal's is that of the schedule that it ends.

    So a weight decay that follows rate over peak goes on where the anneal begins, as the rate does.
    """
    begun = lineage.phases[-1].start_lr
    if isinstance(phase.schedule, AnnealSchedule) and phase.schedule.max_lr == "last":
        for before in reversed(lineage.phases[:-1]):
            if (highest := before.schedule.get("max_lr", "last")) != "last":
                return float(highest)
            if before.schedule["kind"] != "anneal":
                return before.start_lr
    return peak(phase.schedule, last_lr=begun)


def open_phase(lineage: Lineage, inputs: Inputs) -> PhaseStream:
    """The samples of a lineage's last phase, from the opened sources, or from where the lineage says they lie."""
    return PhaseStream(lineage, lambda record: open_recorded(record, inputs.opened, inputs.cache))


def plan_phases(found: Found) -> Iterator[tuple[int, PhaseStream, Lineage]]:
    """(index, samples, lineage after it) of each phase that is left, the one that is under way included.

    Going through it finds what would stop the run at a later phase: names that are taken, sources that are too small,
    replays of what was not seen, history whose data is gone.
    """
    config, origin, sources = found.config, found.origin, found.inputs.sources
    lineage = origin.lineage
    for index in range(origin.phase, len(config.phases)):
        phase = config.phases[index]
        if index > origin.phase or not origin.samples:
            lineage = lineage.with_phase(begin_phase(config, index, lineage, sources))
        stream = open_phase(lineage, found.inputs)
        record = stream.record
        last_lr = schedule_of(config, phase, record.start_lr, record.budget_steps)(record.budget_steps)
        lineage = lineage.with_phase(stream.seen(record.budget_samples, last_lr))
        yield index, stream, lineage


def check_phases(found: Found, say: Callable[[str], None], *, shards: bool) -> int:
    """Goes through the phases that are left and says what is to be known of them; returns the steps of all phases.

    shards: look whether those of what is replayed are there, which one rank does for all. Raises as `plan_phases` does.
    """
    lineage = found.origin.lineage
    for line in (*packing_notice(found), *split_notice(found)):
        say(line)
    for index, stream, after in plan_phases(found):
        lineage = after
        if shards:
            stream.check_replayed()
        for line in notices(found.config, index, stream):
            say(line)
    return sum(record.budget_steps for record in run_phases(lineage, found.config))


def run_phases(after: Lineage, config: RunConfig) -> tuple[PhaseRecord, ...]:
    """The records of the configuration's phases; after: the lineage where they are over."""
    return after.phases[-len(config.phases) :]


def how_it_begins(origin: Origin) -> list[str]:
    """Lines on what was made of the model that a run starts from, where it is still at its beginning."""
    if origin.parent is None:
        return []
    made = [event for event in origin.lineage.events if event.after == len(origin.lineage.phases)]
    made = [event for event in made if isinstance(event, ConversionRecord | VocabularyRecord)]
    return [line for event in made for line in describe_event(event)]


def packing_notice(found: Found) -> list[str]:
    """A line for each source of a store whose documents are packed: its rows are counted from all of its shards."""
    if found.config.packing == "cut":
        return []
    return [
        f"source {name!r}: packing counts the rows of all its shards before the first step, so each machine fetches "
        f"all {int(source.train.sizes.sum()):,} bytes from the store first"
        for name, source in found.inputs.sources.items()
        if isinstance(source.folder, RemoteFolder)
    ]


def split_notice(found: Found) -> list[str]:
    """A line where the run's sources hold out different parts of their documents: copies may be on both sides then."""
    parts = {name: source.held_out for name, source in found.inputs.sources.items()}
    if len({*parts.values()}) < 2:
        return []
    named = ", ".join(f"{name} {part:g}" for name, part in parts.items())
    return [
        f"the sources hold out different parts of their documents ({named}): one that two of them have may be held out "
        "of one and trained on in the other. Prepare them with the same --validation, or with --dedup-against."
    ]


def notices(config: RunConfig, index: int, stream: PhaseStream) -> list[str]:
    """What a user should know of a phase: what runs out or is read twice, and weights that had to be rounded."""
    phase, record = config.phases[index], stream.record
    lines = [
        f"phase {phase.name!r}: source {source.name!r} runs out at step {record.step_of(source.runs_out):,}; "
        "from there on the others share its places"
        for source in record.sources
        if source.runs_out is not None and source.runs_out < record.budget_samples
    ]
    lines += [
        f"phase {phase.name!r}: replay.max_times is reached for phase {entry.phase!r} at step "
        f"{record.step_of(entry.runs_out):,}; from there on the others share its places"
        for entry in (record.replay.from_ if record.replay else ())
        if entry.runs_out is not None
    ]
    if record.budget_steps < config.steps_of(phase):
        lines.append(_end_of(config, index, record))
    lines += stream.repeats()
    lines += _fetched_again(stream)
    named = {source.name: stream.source_of(source) for source in record.sources}
    given = () if phase.continues else (phase.mixture, *(c.mixture for c in phase.mixture_changes))
    asked = [asked_weights(phase, mixture, named) for mixture in given]
    if phase.replay:
        asked.append({**(phase.replay.from_ or phase.replay.from_sources or {})})
    for weights in filter(None, asked):
        whole, exact = integer_weights(weights), {name: Fraction(weight) for name, weight in weights.items()}
        for name, weight in whole.items():
            share, wanted = Fraction(weight, sum(whole.values())), exact[name] / sum(exact.values())
            if abs(share - wanted) > wanted / 100:
                lines.append(
                    f"phase {phase.name!r}: {name!r} gets {float(share):.3g} of the samples, not the "
                    f"{float(wanted):.3g} asked for"
                )
    return lines


def _fetched_again(stream: PhaseStream) -> Iterator[str]:
    for phase, source, size in stream.scattered():
        folder = stream.source_of(source).folder
        if not isinstance(folder, RemoteFolder) or size <= folder.cache.size:
            continue
        what, remedy = f"reads source {source.name!r}", f"Set sources.{source.name}.window, or raise cache.size"
        if phase is not None:
            what = f"replays source {source.name!r} of phase {phase!r}"
            remedy = "Raise cache.size" + ("" if source.window is None else ", or set replay.policy to original")
        yield (
            f"phase {stream.record.name!r} {what} from a store in a permutation of all its sequences, and its shards, "
            f"{size:,} bytes, do not fit into the cache of {folder.cache.size:,}: each is fetched again and again. "
            f"{remedy}"
        )


def _end_of(config: RunConfig, index: int, record: PhaseRecord) -> str:
    """Where a phase ends early, for which sources, and which changes of its mixture are not reached."""
    phase, steps = config.phases[index], config.steps_of(config.phases[index])
    mixed, unreached = [*phase.mixture], list[int]()
    if phase.continues:
        own = record.own_before(record.budget_samples)
        last = max((piece for piece in record.mixture if piece.first < max(own, 1)), key=lambda piece: piece.first)
        mixed = [s.name for s, weight in zip(record.sources, last.weights, strict=True) if weight]
    for change in phase.mixture_changes:
        per_step = config.tokens_per_step(phase)
        at = math.ceil(length_in_steps(change.at, phase_steps=steps, tokens_per_step=per_step))
        if at <= record.budget_steps:
            mixed = [*change.mixture]
        else:
            mixed += change.mixture if change.how == "linear" and not unreached else ()
            unreached.append(at)
    if phase.when_exhausted == "stop":
        mixed = [s.name for s in record.sources if s.runs_out is not None]
    named = ", ".join(dict.fromkeys(mixed))
    line = f"phase {record.name!r} ends after step {record.budget_steps:,} of {steps:,}, where {named} "
    line += "have been read to their ends" if len(set(mixed)) > 1 else "has been read to its end"
    return line + (
        f"; what its mixture changes to from step {unreached[0] + 1:,} on is not reached" if unreached else ""
    )


def check_ranks(config: RunConfig, ranks: int) -> None:
    """Raises ConfigError or LaunchError where so many ranks cannot share the run."""
    engine = config.engine
    if engine.kind == "native" and ranks > 1:
        raise ConfigError(f"engine.kind is native, which runs on one rank, and there are {ranks}; use deepspeed.")
    check_groups(ranks, tensor_parallel=engine.tensor_parallel, sequence_parallel=engine.sequence_parallel)


def check_batches(config: RunConfig, dp_size: int) -> None:
    """Raises ConfigError where a phase's batch cannot be dealt out to data-parallel ranks in whole micro batches."""
    for index, phase in enumerate(config.phases):
        batch = config.batch_size_of(phase)
        micro = config.engine.micro_batch_size or batch / dp_size
        if batch % (dp_size * (config.engine.micro_batch_size or 1)):
            raise ConfigError(
                f"global_batch_size of phases[{index}] is {batch}, micro batch {micro:g} x accumulation "
                f"{batch / dp_size / micro:g} x data-parallel size {dp_size}; all of them must be whole numbers, so "
                "change it, engine.micro_batch_size or the number of ranks."
            )


def plan_text(
    config: RunConfig,
    *,
    resume: bool = True,
    ranks: int | None = None,
    device: Device | None = None,
    machine: Machine | None = None,
) -> Iterator[str]:
    """Lines on the model, then on each phase: tokens, steps, exact shares, epochs, and the rate at its corners; then on
    the memory of a rank.

    ranks: how many there will be; by default as few as can be. device: what they will compute on; by default what is
    here. machine: what the memory is held against; by default what is here. Raises as the start of training on them
    would. What depends on data that is not prepared yet is left out.
    """
    device = device or device_here()
    group = config.engine.tensor_parallel * config.engine.sequence_parallel
    ranks = ranks or group
    check_engine(config.engine, device=device)
    check_ranks(config, ranks)
    check_batches(config, ranks // group)
    parameters = count_parameters(config.model)
    yield f"run {config.run_dir}: {config.model.form}, {parameters:,} parameters, seed {config.seed}"
    warnings: list[str] = []
    newest = newest_checkpoint(Path(config.run_dir), warnings.append)
    origin = find_origin(config, Path(config.run_dir), newest, resume=resume, warn=warnings.append)
    yield from (f"warning: {line}" for line in warnings)
    begin, last_lr = origin.phase, 0.0
    records: dict[int, PhaseRecord] = {}
    if (checkpoint := origin.loaded) is not None:
        seen = origin.lineage.phases
        records = dict(enumerate(seen[len(seen) - begin - bool(origin.samples) :]))
        if seen:
            last_lr = seen[-1].start_lr if origin.samples else seen[-1].last_lr
        yield f"goes on from {checkpoint.path}: {len(seen)} phases, {origin.lineage.tokens:,} tokens"
    missing = missing_sources(config.sources)
    for name in missing:
        yield f"source {name}: not prepared yet; training prepares it first"
    warned: dict[int, list[str]] = {}
    packed: dict[int, list[str]] = {}
    if not missing:
        found = find_inputs(config, origin, open_sources(config, origin))
        yield from (f"  {line}" for line in how_it_begins(found.origin))
        yield from (f"warning: {line}" for line in (*packing_notice(found), *split_notice(found)))
        for index, stream, after in plan_phases(found):
            stream.check_replayed()
            records[index], warned[index] = after.phases[-1], notices(found.config, index, stream)
            packed[index] = stream.packings()
    total = all_steps = flops = 0
    for index, phase in enumerate(config.phases):
        record = records.get(index)
        steps, seq_length = record.budget_steps if record else config.steps_of(phase), config.seq_length_of(phase)
        tokens = steps * config.tokens_per_step(phase)
        total, flops = total + tokens, flops + tokens * flops_per_token(config.model, seq_length)
        all_steps += steps
        yield phase_line(config, index, steps, done=index < begin)
        if index < begin:
            continue
        yield from (f"  {line}" for line in _shares(phase, record))
        schedule = schedule_of(config, phase, last_lr, steps)
        highest = max(schedule(k) for k in range(1, steps + 1, max(1, steps // 100_000)))
        last_lr = schedule(steps)
        yield (
            f"  schedule {phase.schedule.kind}: {schedule(1):.4g} at the first update, {highest:.4g} at the highest, "
            f"{last_lr:.4g} at the last"
        )
        if phase.reptile:
            yield f"  {phase.reptile.words}"
        if record and not missing:
            yield from (f"  {line}" for line in (*_reading(record), *packed.get(index, ())))
        yield from (f"  warning: {line}" for line in warned.get(index, []))
    yield f"{total:,} tokens, {all_steps:,} steps, {flops:.3g} FLOPs in all"
    yield from memory_lines(config, ranks, device, machine)


def phase_line(config: RunConfig, index: int, steps: int, *, done: bool) -> str:
    """A phase's size in one line."""
    phase = config.phases[index]
    return (
        f"phases[{index}] {phase.name}: {steps * config.tokens_per_step(phase):,} tokens = {steps:,} steps x "
        f"{config.batch_size_of(phase)} sequences x {config.seq_length_of(phase)}{', done' if done else ''}"
    )


def _shares(phase: PhaseConfig, record: PhaseRecord | None) -> Iterator[str]:
    if record:
        yield from describe_mixture(record)
    if phase.replay and phase.replay.share:
        origin = phase.replay.from_sources or phase.replay.from_ or ["all earlier phases"]
        policy = f", policy {phase.replay.policy}"
        yield f"replay: {share_of(phase.replay.share)} of all samples, from {', '.join(origin)}{policy}"


def _reading(after: PhaseRecord) -> Iterator[str]:
    """A line for each source and each replayed phase, on how much of it the phase will have read."""
    for source in after.sources:
        yield f"{source.name}: {source.tokens:,} tokens, {source.epochs:.2f} epochs by then"
    if after.replay:
        yield from (f"replays {entry.tokens:,} tokens of phase {entry.phase}" for entry in after.replay.from_)
        yield from (f"replays {source.tokens:,} tokens of {source.name}" for source in after.replay.from_sources)


# ---------------------------------------------------------------------------------------------- megacl data plan


@dataclass(frozen=True)
class Reading:
    """What a phase reads of one source, or replays of one phase or source, from its beginning to its end."""

    kind: Literal["source", "replayed phase", "replayed source"]
    name: str
    samples: int
    tokens: int
    share: float
    """Part of the phase's samples, replayed ones included."""
    epochs: float
    """How often it will have been read by then, over all phases; for a phase, how often its own tokens replayed."""
    runs_out: int | None
    """The phase's step in which it runs out, if it is not to be read again, or not more than max_times."""


def readings(lineage: Lineage) -> list[Reading]:
    """What the last phase of a lineage reads and replays."""
    record = lineage.phases[-1]
    replay = record.replay

    def of_source(source: SourceRecord, kind: Literal["source", "replayed source"]) -> Reading:
        out = None if source.runs_out is None else record.step_of(source.runs_out)
        share = source.samples / record.samples
        return Reading(kind, source.name, source.samples, source.tokens, share, source.epochs, out)

    found = [of_source(source, "source") for source in record.sources]
    if replay is None:
        return found
    for entry in replay.from_:
        share, times = entry.samples / record.samples, times_replayed(lineage, entry.phase)
        out = None if entry.runs_out is None else record.step_of(entry.runs_out)
        found.append(Reading("replayed phase", entry.phase, entry.samples, entry.tokens, share, times, out))
    return [*found, *(of_source(source, "replayed source") for source in replay.from_sources)]


@dataclass(frozen=True)
class PlannedPhase:
    """A phase of a run, as it will have been when it is over."""

    record: PhaseRecord
    done: bool
    readings: list[Reading]
    packed: list[str]
    """How full its packed sequences are, a line a source; none where it is over."""
    notices: list[str]


def plan_data(config: RunConfig) -> tuple[list[str], list[PlannedPhase]]:
    """(what is to be known of a whole run, what each phase reads, those that are over included). Writes nothing.

    Raises as the start of training would, and DataError where a source is not prepared yet.
    """
    if missing := missing_sources(config.sources):
        raise DataError(
            f"source {missing[0]!r} ({config.sources[missing[0]].path}) is not prepared yet, and a plan counts its "
            "tokens; run `megacl prepare` first."
        )
    run_dir = Path(config.run_dir)
    warnings: list[str] = []
    newest = newest_checkpoint(run_dir, warnings.append)
    origin = find_origin(config, run_dir, newest, resume=True, warn=warnings.append)
    found = find_inputs(config, origin, open_sources(config, origin))
    lineage, packed, said = found.origin.lineage, {}, {}
    for index, stream, after in plan_phases(found):
        stream.check_replayed()
        lineage, packed[index], said[index] = after, stream.packings(), notices(found.config, index, stream)
    before = len(lineage.phases) - len(config.phases)
    return [*warnings, *packing_notice(found), *split_notice(found)], [
        PlannedPhase(
            record=record,
            done=index < found.origin.phase,
            readings=readings(Lineage(phases=lineage.phases[: before + index + 1])),
            packed=packed.get(index, []),
            notices=said.get(index, []),
        )
        for index, record in enumerate(run_phases(lineage, config))
    ]
