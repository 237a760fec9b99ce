"""What a run will do, worked out before it starts: said by `megacl train CONFIG --dry-run`, checked by every start.

    for index, stream, after in plan_phases(found):    # each phase that is left: its samples, the lineage after it
        print(notices(found.config.phases[index], stream))

A phase's record, schedule and samples are made here, by the same functions for a dry run and for training.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from megacl.checkpoint import newest_checkpoint
from megacl.config import RunConfig
from megacl.config_phase import PhaseConfig, share_of
from megacl.configfile import to_tree
from megacl.data.mixture import integer_weights
from megacl.data.provide import missing_sources
from megacl.data.shards import Source
from megacl.data.stream import PhaseStream, open_recorded, plan_phase
from megacl.errors import ConfigError
from megacl.lineage import Lineage, PhaseRecord
from megacl.model.gpt import count_parameters, flops_per_token
from megacl.resume import Found, Inputs, find_inputs, find_origin, open_sources
from megacl.schedules import Schedule, build_schedule


def begin_phase(config: RunConfig, index: int, lineage: Lineage, sources: Mapping[str, Source]) -> PhaseRecord:
    """The record of the configuration's phase `index` as it begins after `lineage`. Raises as `plan_phase` does."""
    phase = config.phases[index]
    keep = phase.optimizer_state == "keep" or (phase.optimizer_state is None and phase.schedule.keeps_optimizer_state)
    return plan_phase(
        lineage,
        phase,
        sources,
        run=Path(config.run_dir).name,
        seed=config.seed,
        seq_length=config.seq_length_of(phase),
        global_batch_size=config.batch_size_of(phase),
        steps=config.steps_of(phase),
        schedule=to_tree(phase.schedule),
        optimizer_state="new" if not lineage.phases else "kept" if keep else "reset",
        start_lr=lineage.phases[-1].last_lr if lineage.phases else 0.0,
    )


def schedule_of(config: RunConfig, phase: PhaseConfig, start_lr: float) -> Schedule:
    """The learning rate of a phase's updates; start_lr: the rate at which the phase before ended."""
    return build_schedule(
        phase.schedule,
        steps=config.steps_of(phase),
        tokens_per_step=config.tokens_per_step(phase),
        last_lr=start_lr,
    )


def open_phase(lineage: Lineage, inputs: Inputs) -> PhaseStream:
    """The samples of a lineage's last phase, from the opened sources, or from where the lineage says they lie."""
    return PhaseStream(lineage, lambda record: open_recorded(record, inputs.opened))


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
        last_lr = schedule_of(config, phase, stream.record.start_lr)(config.steps_of(phase))
        lineage = lineage.with_phase(stream.seen(stream.record.budget_samples, last_lr))
        yield index, stream, lineage


def notices(phase: PhaseConfig, stream: PhaseStream) -> list[str]:
    """What a user should know of a phase, a line each: what is read twice, and weights that had to be rounded."""
    lines = stream.repeats()
    for weights in (phase.mixture, (phase.replay.from_ or phase.replay.from_sources or {}) if phase.replay else {}):
        whole, total = integer_weights(weights) if weights else {}, sum(weights.values())
        for name, weight in whole.items():
            share, asked = weight / sum(whole.values()), weights[name] / total
            if abs(share / asked - 1) > 0.01:
                lines.append(
                    f"phase {phase.name!r}: {name!r} gets {share:.3g} of the samples, not the {asked:.3g} asked for"
                )
    return lines


def check_batches(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError where a phase's batch cannot be dealt out to the ranks in whole micro batches."""
    micro = config.engine.micro_batch_size
    for index, phase in enumerate(config.phases):
        batch = config.batch_size_of(phase)
        if batch % (world_size * (micro or 1)):
            times = f" x engine.micro_batch_size, {micro}" if micro else ""
            raise ConfigError(
                f"global_batch_size of phases[{index}] is {batch}; it must be a multiple of the number of ranks, "
                f"{world_size}{times}."
            )


def plan_text(config: RunConfig, *, resume: bool = True) -> Iterator[str]:
    """Lines on the model, then on each phase: tokens, steps, exact shares, epochs, and the rate at its corners.

    Raises as the start of training would, on one rank. What depends on data that is not prepared yet is left out.
    """
    parameters = count_parameters(config.model)
    yield f"run {config.run_dir}: {config.model.form}, {parameters:,} parameters, seed {config.seed}"
    check_batches(config, 1)
    warnings: list[str] = []
    newest = newest_checkpoint(Path(config.run_dir), warnings.append)
    origin = find_origin(config, Path(config.run_dir), newest, resume=resume, warn=warnings.append)
    yield from (f"warning: {line}" for line in warnings)
    begin, last_lr = origin.phase, 0.0
    if (checkpoint := origin.checkpoint or origin.parent) is not None:
        records = origin.lineage.phases
        last_lr = records[-1].start_lr if origin.samples else records[-1].last_lr
        yield f"goes on from {checkpoint.path}: {len(records)} phases, {origin.lineage.tokens:,} tokens"
    missing = missing_sources(config.sources)
    for name in missing:
        yield f"source {name}: not prepared yet; training prepares it first"
    reading: dict[int, list[str]] = {}
    if not missing:
        found = find_inputs(config, origin, open_sources(config, origin))
        for index, stream, after in plan_phases(found):
            warned = (f"warning: {line}" for line in notices(config.phases[index], stream))
            reading[index] = [*_reading(after.phases[-1]), *warned]
    total = flops = 0
    for index, phase in enumerate(config.phases):
        steps, seq_length = config.steps_of(phase), config.seq_length_of(phase)
        tokens = steps * config.tokens_per_step(phase)
        total, flops = total + tokens, flops + tokens * flops_per_token(config.model, seq_length)
        yield (
            f"phases[{index}] {phase.name}: {tokens:,} tokens = {steps:,} steps x "
            f"{config.batch_size_of(phase)} sequences x {seq_length}{', done' if index < begin else ''}"
        )
        if index < begin:
            continue
        yield from (f"  {line}" for line in _shares(phase))
        schedule = schedule_of(config, phase, last_lr)
        highest = max(schedule(k) for k in range(1, steps + 1, max(1, steps // 100_000)))
        last_lr = schedule(steps)
        yield (
            f"  schedule {phase.schedule.kind}: {schedule(1):.4g} at the first update, {highest:.4g} at the highest, "
            f"{last_lr:.4g} at the last"
        )
        yield from (f"  {line}" for line in reading.get(index, []))
    yield f"{total:,} tokens, {config.total_steps:,} steps, {flops:.3g} FLOPs in all"


def _shares(phase: PhaseConfig) -> Iterator[str]:
    whole = integer_weights(phase.mixture)
    period = sum(whole.values())
    yield "new data: " + ", ".join(f"{name} {weight}/{period}" for name, weight in whole.items())
    if phase.replay and phase.replay.share:
        origin = phase.replay.from_sources or phase.replay.from_ or ["all earlier phases, by their tokens"]
        yield f"replay: {share_of(phase.replay.share)} of all samples, from {', '.join(origin)}"


def _reading(after: PhaseRecord) -> Iterator[str]:
    """A line for each source and each replayed phase, on how much of it the phase will have read."""
    for source in after.sources:
        yield f"{source.name}: {source.tokens:,} tokens, {source.epochs:.2f} epochs by then"
    if after.replay:
        yield from (f"replays {entry.tokens:,} tokens of phase {entry.phase}" for entry in after.replay.from_)
        yield from (f"replays {source.tokens:,} tokens of {source.name}" for source in after.replay.from_sources)
