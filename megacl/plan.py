"""What a run will do, said before it starts: `megacl train CONFIG --dry-run`."""

from collections.abc import Iterator
from pathlib import Path

from megacl.checkpoint import find_checkpoint, open_checkpoint
from megacl.config import PhaseConfig, RunConfig
from megacl.configfile import to_tree
from megacl.data.mixture import integer_weights
from megacl.data.replay import share_of
from megacl.data.shards import Source, open_source
from megacl.data.stream import PhaseStream, open_recorded, plan_phase
from megacl.lineage import Lineage
from megacl.model.gpt import count_parameters, flops_per_token
from megacl.schedules import build_schedule


def plan_text(config: RunConfig) -> Iterator[str]:
    """Lines on the model, then on each phase: tokens, steps, exact shares, epochs, and the rate at its corners.

    What depends on data that is not prepared yet is left out, and said to be. Raises as training itself would where
    the configuration does not fit data that is there.
    """
    parameters = count_parameters(config.model)
    yield f"run {config.run_dir}: {config.model.form}, {parameters:,} parameters, seed {config.seed}"
    lineage, last_lr = Lineage(), 0.0
    if config.start_from is not None:
        parent = open_checkpoint(find_checkpoint(config.start_from))
        lineage, last_lr = parent.lineage, parent.lineage.phases[-1].last_lr
        yield f"goes on from {parent.path}: {len(lineage.phases)} phases, {lineage.tokens:,} tokens"
    sources = {
        name: open_source(source.path, source.generation)
        for name, source in config.sources.items()
        if source.documents is None or (Path(source.path) / "manifest.json").exists()
    }
    for name in config.sources.keys() - sources.keys():
        yield f"source {name}: not prepared yet; training prepares it first"
    total = 0
    for index, phase in enumerate(config.phases):
        steps, per_step = config.steps_of(phase), config.tokens_per_step(phase)
        total += steps * per_step
        yield (
            f"phases[{index}] {phase.name}: {steps * per_step:,} tokens = {steps:,} steps x "
            f"{config.batch_size_of(phase)} sequences x {config.seq_length_of(phase)}"
        )
        yield from (f"  {line}" for line in _shares(phase))
        schedule = build_schedule(phase.schedule, steps=steps, tokens_per_step=per_step, last_lr=last_lr)
        rates = [schedule(k) for k in range(1, steps + 1)] if steps <= 1_000_000 else [schedule(1), schedule(steps)]
        yield (
            f"  schedule {phase.schedule.kind}: {rates[0]:.4g} at the first update, {max(rates):.4g} at the highest, "
            f"{rates[-1]:.4g} at the last"
        )
        if phase.mixture.keys() <= sources.keys():
            lineage, lines = _reading(config, phase, lineage, sources, last_lr, rates[-1])
            yield from (f"  {line}" for line in lines)
        last_lr = rates[-1]
    flops = total * flops_per_token(config.model, config.seq_length)
    yield f"{total:,} tokens, {config.total_steps:,} steps, {flops:.3g} FLOPs in all"


def _shares(phase: PhaseConfig) -> Iterator[str]:
    whole = integer_weights(phase.mixture)
    period = sum(whole.values())
    yield "new data: " + ", ".join(f"{name} {weight}/{period}" for name, weight in whole.items())
    if phase.replay and phase.replay.share:
        origin = phase.replay.from_sources or phase.replay.from_ or {"all earlier phases, by their tokens": 1}
        yield f"replay: {share_of(phase.replay.share)} of all samples, from {', '.join(origin)}"


def _reading(
    config: RunConfig,
    phase: PhaseConfig,
    lineage: Lineage,
    sources: dict[str, Source],
    start_lr: float,
    last_lr: float,
) -> tuple[Lineage, list[str]]:
    """The lineage after the phase, and a line for each source on how much of it the phase will have read."""
    record = plan_phase(
        lineage,
        phase,
        sources,
        run=Path(config.run_dir).name,
        seed=config.seed,
        seq_length=config.seq_length_of(phase),
        global_batch_size=config.batch_size_of(phase),
        steps=config.steps_of(phase),
        schedule=to_tree(phase.schedule),
        optimizer_state="new",
        start_lr=start_lr,
    )
    stream = PhaseStream(lineage.with_phase(record), lambda wanted: open_recorded(wanted, sources.values()))
    after = stream.seen(record.budget_samples, last_lr)
    lines = [f"{source.name}: {source.tokens:,} tokens, {source.epochs:.2f} epochs by then" for source in after.sources]
    if after.replay:
        lines += [f"replays {entry.tokens:,} tokens of phase {entry.phase}" for entry in after.replay.from_]
        lines += [f"replays {source.tokens:,} tokens of {source.name}" for source in after.replay.from_sources]
    return lineage.with_phase(after), lines + [f"warning: {line}" for line in stream.repeats()]
