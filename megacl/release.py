"""Annealed releases: runs off a trunk whose rate is constant, which stays as it is and goes on with next month's data.

    config = anneal_config("runs/trunk@9000", anneal="2e9", shape="linear", out=Path("runs/october"), warn=print)
    train(config)                                  # an ordinary run of one phase, whose rate falls to min_lr

It is a branch: it starts from a checkpoint of the trunk, weights, moments and history, reads what the trunk reads next,
own samples and replayed ones, and lowers the rate. Of the trunk, files are read and none is written. A release without
training is made by release_merge.py.
"""

import dataclasses
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from megacl.checkpoint import Checkpoint, checkpoint_path, find_checkpoint, open_checkpoint
from megacl.config import RunConfig
from megacl.config_phase import AnnealSchedule, AnnealShape, PhaseConfig, ScheduleConfig
from megacl.configfile import from_tree, load, to_tree
from megacl.errors import ConfigError
from megacl.lineage import Lineage, PhaseRecord, load_lineage
from megacl.schedules import constant_part

Warn = Callable[[str], None]

# ---------------------------------------------------------------------------------------------- the trunk


def check_on_trunk(checkpoint: Checkpoint) -> None:
    """Raises ConfigError, saying what to do, where the rate at a checkpoint is not its schedule's constant one."""
    lineage, state = checkpoint.lineage, checkpoint.state
    name = place_of(checkpoint)
    if lineage.untrained_merge:
        raise ConfigError(f"{name} is itself merged from checkpoints of a trunk; release from that trunk.")
    if not checkpoint.config.phases:
        raise ConfigError(f"{name} was converted and not trained since, so no rate is known; start_from it first.")
    phase, record = checkpoint.config.phases[state.phase], lineage.phases[-1]
    constant, done = constant_updates(checkpoint.config, state.phase, record), steps_done(record)
    if done in constant:
        return
    kind = phase.schedule.kind
    if not constant:
        raise ConfigError(
            f"{name} has no trunk to release from: the rate of phase {phase.name!r} follows schedule {kind}, which "
            "falls all the time. It is a release as it is; for new data, start_from it with a schedule that warms up "
            "again, and for releases now and then train with infinite, constant or wsd."
        )
    before = state.step - done
    if done < constant[0]:
        raise ConfigError(
            f"{name} is not on its constant rate yet: phase {phase.name!r}, schedule {kind}, warms up or cools down "
            f"until step {before + constant[0]}; release from that step on (--at)."
        )
    raise ConfigError(
        f"{name} has no trunk to release from: the rate of phase {phase.name!r}, schedule {kind}, has been falling "
        f"since step {before + constant[-1]}. Release from a checkpoint of steps {before + constant[0]} to "
        f"{before + constant[-1]} (--at), or start_from this one with a schedule that warms up again."
    )


def constant_updates(config: RunConfig, index: int, record: PhaseRecord) -> range:
    """The updates of a phase at its constant rate; record: the phase's, which says how many steps it has."""
    phase = config.phases[index]
    per_step = config.tokens_per_step(phase)
    return constant_part(phase.schedule, steps=record.budget_steps, tokens_per_step=per_step)


def steps_done(record: PhaseRecord) -> int:
    return record.samples // record.global_batch_size


def final_rate(schedule: ScheduleConfig, rate: float, given: float | None) -> float:
    """The rate that a release ends at: as given, as the trunk's schedule says, or a tenth of the trunk's rate."""
    said = getattr(schedule, "min_lr", None) if given is None else given
    min_lr = 0.1 * rate if said is None else float(said)
    if not 0 <= min_lr <= rate:
        raise ConfigError(f"min_lr is {min_lr:g}; it must lie between 0 and the trunk's rate, {rate:g} (--min-lr).")
    return min_lr


def reference_to(run: str, step: int | None) -> str:
    if step is None:
        return run
    if "@" in run and not Path(run).is_dir():
        raise ConfigError(f"{run} names a place in the run, and so does --at {step}; give one of them.")
    return f"{run}@{step}"


def place_of(checkpoint: Checkpoint) -> str:
    """RUN@STEP, or the folder of a checkpoint that stands in no run directory."""
    path = checkpoint.path
    run_dir = path.parent.parent
    in_run = path == checkpoint_path(run_dir, checkpoint.state.step)
    return f"{run_dir}@{checkpoint.state.step}" if in_run else str(path)


# ---------------------------------------------------------------------------------------------- annealing


def anneal_config(
    run: str,
    *,
    anneal: str,
    out: Path,
    warn: Warn,
    step: int | None = None,
    shape: AnnealShape = "exponential",
    min_lr: float | None = None,
) -> RunConfig:
    """The configuration of the run in `out` that anneals `run` (RUN, RUN@PHASE, RUN@STEP), or RUN at `step`.

    anneal: its tokens, "2e9", or "5%" of what the model has seen. min_lr: the last update's rate; None: the one that
    the trunk's schedule names, or a tenth of the trunk's rate. Where `out` holds such a release, it is that one,
    wherever the trunk stands by now. Raises ConfigError where the trunk's rate is not constant there, CheckpointError
    where there is nothing to begin from.
    """
    reference = reference_to(run, step)
    if (out / "config.yaml").is_file():
        stored = load([str(out / "config.yaml")])
        phase = stored.phases[0]
        if stored.start_from is None or not phase.continues or not isinstance(phase.schedule, AnnealSchedule):
            raise ConfigError(f"{out} holds a run that is no annealed release; name another folder with --out.")
        if reference == stored.start_from.rpartition("@")[0]:
            reference = stored.start_from
        if (out / "lineage.json").is_file():  # of the trunk, nothing is needed any more
            if reference != stored.start_from:
                reference = place_of(open_checkpoint(find_checkpoint(reference, warn)))
            before = [each for each in load_lineage(out).phases if each.name != phase.name]
            lowest = phase.schedule.min_lr if min_lr is None else min_lr
            phase = dataclasses.replace(
                phase,
                tokens=_tokens(anneal, Lineage(phases=tuple(before))),
                schedule=dataclasses.replace(phase.schedule, shape=shape, min_lr=lowest),
            )
            # What differs from what is stored is found, and named, where the run goes on.
            return _checked(dataclasses.replace(stored, start_from=reference, phases=(phase, *stored.phases[1:])))
    checkpoint = open_checkpoint(find_checkpoint(reference, warn))
    check_on_trunk(checkpoint)
    record = checkpoint.lineage.phases[-1]
    phase = checkpoint.config.phases[checkpoint.state.phase]
    lowest = final_rate(phase.schedule, record.last_lr, min_lr)
    if phase.reptile:
        warn(_without_reptile(checkpoint, phase.reptile.every_steps))
    schedule = AnnealSchedule(kind="anneal", shape=shape, min_lr=lowest)
    tokens = _tokens(anneal, checkpoint.lineage)
    phase = anneal_phase(phase, name=free_name(checkpoint.lineage), tokens=tokens, schedule=schedule)
    return _checked(
        dataclasses.replace(checkpoint.config, run_dir=str(out), start_from=place_of(checkpoint), phases=(phase,))
    )


def anneal_phase(trunk: PhaseConfig, *, name: str, tokens: int, schedule: AnnealSchedule) -> PhaseConfig:
    """The phase that reads on where a trunk's phase was left, at a rate that falls."""
    return dataclasses.replace(
        trunk,
        name=name,
        continues=True,
        mixture={},
        mixture_changes=(),
        tokens=tokens,
        steps=None,
        schedule=schedule,
        optimizer_state="keep",
        reptile=None,  # a move would take back a part of the anneal
    )


def _without_reptile(checkpoint: Checkpoint, every: int) -> str:
    record = checkpoint.lineage.phases[-1]
    done = steps_done(record)
    line = f"{place_of(checkpoint)} is trained with reptile, and its release without: a move would undo some of it"
    if done % every == 0:
        return line
    moves = min(max(1, round(done / every)), record.budget_steps // every)
    nearest = checkpoint.state.step - done + moves * every
    return f"{line}. The weights lie between two moves; the nearest step at one is {nearest} (--at)"


def _checked(config: RunConfig) -> RunConfig:
    """The configuration as a file of it would be read, with every rule looked at."""
    return from_tree(to_tree(config))


def free_name(lineage: Lineage) -> str:
    """ "release", or "release-2" and so on where a phase or a merge of the model's is named so."""
    names = ("release", *(f"release-{number}" for number in range(2, len(lineage.names) + 2)))
    return next(name for name in names if name not in lineage.names)


def _tokens(text: str, before: Lineage) -> int:
    """A budget: tokens, or a part of those that the model has learned from."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d{1,2})?) *(%|tokens?)?", text.strip())
    if match is None:
        raise ConfigError(
            f"--anneal is {text!r}; it must be a number of tokens, such as 2e9, or a part of those that the trunk has "
            "learned from, such as 5%."
        )
    number = Fraction(match[1])
    return int(number * before.tokens / 100 if match[2] == "%" else number)
