"""Merged releases: a weighted mean of a trunk's checkpoints in the place of training on with a falling rate.

    merge("runs/trunk", "last:5", shape="linear", out=Path("runs/october"), warn=print)

The mean imitates a decay of the rate over the steps between the checkpoints (merging.py). It is an ordinary checkpoint
in a run directory of its own, without an optimizer's state. Of the trunk, files are read and none is written.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacl.checkpoint import (
    Checkpoint,
    RunState,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    mark_of,
    newest_checkpoint,
    open_checkpoint,
)
from megacl.config import EngineConfig, RunConfig
from megacl.config_phase import ScheduleConfig
from megacl.configfile import dump
from megacl.errors import CheckpointError, ConfigError
from megacl.evaluate import evaluate_sources, sources_of
from megacl.inference import engine_of
from megacl.lineage import Lineage, MergedCheckpoint, MergeRecord, is_part_of, load_lineage, save_lineage
from megacl.log import RunLog
from megacl.merging import MergeShape, decay_over, merge_files, merge_weights
from megacl.parallel.ranks import Ranks, start_ranks, stop_ranks
from megacl.plan import check_ranks
from megacl.publish import alone_in, publish_text, sweep_unfinished
from megacl.records import record_evaluation
from megacl.release import (
    Warn,
    check_on_trunk,
    constant_updates,
    final_rate,
    free_name,
    place_of,
    reference_to,
    steps_done,
)
from megacl.resume import Origin, check_no_data, open_sources, shard_cache
from megacl.saving import publish_checkpoint


@dataclass(frozen=True)
class Merge:
    """Checkpoints of one trunk, oldest first, and the part that each has in the mean."""

    shape: MergeShape
    checkpoints: tuple[Checkpoint, ...]
    weights: tuple[float, ...]

    @property
    def newest(self) -> Checkpoint:
        return self.checkpoints[-1]

    def record(self) -> MergeRecord:
        """The merge as the lineage records it."""
        return MergeRecord(
            name=free_name(self.newest.lineage),
            after=len(self.newest.lineage.phases),
            shape=self.shape,
            checkpoints=tuple(
                MergedCheckpoint(**dataclasses.asdict(mark_of(checkpoint)), weight=weight)
                for checkpoint, weight in zip(self.checkpoints, self.weights, strict=True)
            ),
        )

    def lines(self) -> Iterator[str]:
        """The merge as text: a line a checkpoint."""
        yield f"a mean of {len(self.checkpoints)} checkpoints, shape {self.shape}"
        for checkpoint, weight in zip(self.checkpoints, self.weights, strict=True):
            yield f"  {place_of(checkpoint)}  weight {weight:.6g}"


def choose(
    run: str,
    which: str,
    *,
    shape: MergeShape,
    warn: Warn,
    step: int | None = None,
    min_lr: float | None = None,
) -> Merge:
    """The checkpoints of `run` that are to be merged, and their weights.

    which: "last:N", N in all up to the one that `run` and `step` name, or steps, "800,900,1000". shape: of the decay of
    the rate over all steps between them, from the trunk's to `min_lr` (as for an anneal) at the last one; "mean" weighs
    them alike (arXiv 2505.12082). Raises ConfigError where they do not lie on one constant rate, CheckpointError where
    one is missing or damaged.
    """
    checkpoints = _find(run, which, step, warn)
    newest = checkpoints[-1]
    for checkpoint in checkpoints:
        check_on_trunk(checkpoint)
        if not _leads_to(checkpoint.lineage, newest.lineage):
            raise ConfigError(
                f"{place_of(checkpoint)} does not lead to {place_of(newest)}: it is of another run, or of a course "
                "that the run gave up when it went back; merge checkpoints of one course."
            )
        record = checkpoint.lineage.phases[-1]
        if record.reptile is not None and steps_done(record) % record.reptile.every_steps:
            warn(f"{place_of(checkpoint)} lies between two moves of Reptile, {record.reptile.every_steps} steps apart")
    _check_constant_between(checkpoints[0], newest)
    steps = [checkpoint.state.step for checkpoint in checkpoints]
    return Merge(shape, checkpoints, _weights(newest, shape, steps, min_lr))


def _weights(newest: Checkpoint, shape: MergeShape, steps: Sequence[int], min_lr: float | None) -> tuple[float, ...]:
    """The parts of a trunk's checkpoints in the mean; newest: the last of them, or what was merged from them."""
    rate = newest.lineage.phases[-1].last_lr
    lowest = lowest_rate(shape, newest.config.phases[newest.state.phase].schedule, rate, min_lr)
    if lowest is None:
        return (1 / len(steps),) * len(steps)
    return tuple(merge_weights(decay_over(shape, steps, floor=lowest / rate)))


def lowest_rate(shape: MergeShape, schedule: ScheduleConfig, rate: float, given: float | None) -> float | None:
    """Where the decay that a merge imitates ends; None for a mean, which imitates none.

    schedule, rate: the trunk's. given: min_lr. Raises ConfigError where there is no such decay.
    """
    if shape == "mean":
        if given is not None:
            raise ConfigError(
                "shape is mean, which weighs all checkpoints alike and ends at no rate; leave out --min-lr (min_lr)."
            )
        return None
    lowest = final_rate(schedule, rate, given)
    if shape == "exponential" and not lowest:
        raise ConfigError("min_lr is 0, which an exponential decay never reaches; give a rate above 0 (--min-lr).")
    return lowest


def held_merge(
    run: str,
    which: str,
    *,
    shape: MergeShape,
    out: Path,
    step: int | None = None,
    min_lr: float | None = None,
) -> Checkpoint | None:
    """The merged checkpoint in `out` where it is what the arguments ask for, wherever the trunk stands by now."""
    if (path := newest_checkpoint(out, lambda line: None)) is None:
        return None
    held = open_checkpoint(path)
    record, trunk = held.lineage.events[-1:], str(held.config.start_from)
    if not (record and isinstance(record[0], MergeRecord)):
        return None
    if Path(reference_to(run, step)) not in (Path(trunk), Path(trunk.rpartition("@")[0])):
        return None
    steps = [each.step for each in record[0].checkpoints]
    named = f"last:{len(steps)}" if which.startswith("last:") else ",".join(map(str, steps))
    if (which, shape) != (named, record[0].shape):
        return None
    weights = tuple(each.weight for each in record[0].checkpoints)
    return held if weights == _weights(held, shape, steps, min_lr) else None


def _find(run: str, which: str, step: int | None, warn: Warn) -> tuple[Checkpoint, ...]:
    reference = reference_to(run, step)
    if (last := re.fullmatch(r"last:([1-9]\d*)", which)) is not None:
        newest = open_checkpoint(find_checkpoint(reference, warn))
        count, run_dir = int(last[1]), newest.path.parent.parent
        paths = [path for path in list_checkpoints(run_dir) if path.name <= newest.path.name]
        if len(paths) < count:
            keep = newest.config.checkpoint.keep_last
            raise CheckpointError(
                f"{run_dir}: there are {len(paths)} checkpoints up to step {newest.state.step}, and --merge {which} "
                f"takes {count}; train on with checkpoint.keep_last (now {keep}) at {count} or more, or merge fewer."
            )
        places = [str(path) for path in paths[-count:]]
    elif re.fullmatch(r"\d+(,\d+)*", which):
        if reference != run or (Path(run) / "manifest.json").is_file() or not Path(run).is_dir():
            raise ConfigError(f"--merge {which} names steps of a run, and {reference} is no run directory; name that.")
        places = [f"{run}@{number}" for number in sorted({int(each) for each in which.split(",")})]
    else:
        raise ConfigError(f"--merge is {which!r}; it must be last:N, or steps such as 800,900,1000.")
    if len(places) < 2:
        raise ConfigError(f"--merge {which} names one checkpoint; a mean is of two or more.")
    return tuple(open_checkpoint(find_checkpoint(place, warn, moments=False)) for place in places)


def _leads_to(earlier: Lineage, later: Lineage) -> bool:
    """Whether a model went through one state of a lineage on its way to another."""
    count = len(earlier.entries)
    if len(later.entries) < count or earlier.ids[:-1] != later.ids[: count - 1]:
        return False
    was, now = earlier.phases[-1], later.phases[len(earlier.phases) - 1]
    itself = ("run", "name", "seed", "budget_samples", "schedule", "mixture")
    same = all(getattr(was, key) == getattr(now, key) for key in itself)
    same &= [source.fingerprint for source in was.sources_read] == [source.fingerprint for source in now.sources_read]
    return same and is_part_of(was, now)


def _check_constant_between(oldest: Checkpoint, newest: Checkpoint) -> None:
    """Raises ConfigError where the rate was another one somewhere between two checkpoints of a trunk."""
    begun = newest.lineage.phases[-newest.state.phase - 1 :]  # the run's own
    for index in range(oldest.state.phase, newest.state.phase + 1):
        record = begun[index]
        first = steps_done(oldest.lineage.phases[-1]) if index == oldest.state.phase else 1
        last = steps_done(record)
        constant = constant_updates(newest.config, index, record)
        if not (first in constant and last in constant):
            raise ConfigError(
                f"between {place_of(oldest)} and {place_of(newest)} the rate was not constant: phase "
                f"{record.name!r}, schedule {record.schedule['kind']}, is at its constant rate in its steps "
                f"{constant.start} to {constant.stop - 1} of {record.budget_steps}; merge checkpoints of one stretch."
            )
        rate = oldest.lineage.phases[-1].last_lr
        if record.last_lr != rate:
            raise ConfigError(
                f"between {place_of(oldest)} and {place_of(newest)} the rate went from {rate:g} to {record.last_lr:g}, "
                f"in phase {record.name!r}; merge checkpoints of one rate."
            )


def merge(
    run: str,
    which: str,
    *,
    shape: MergeShape,
    out: Path,
    warn: Warn,
    step: int | None = None,
    min_lr: float | None = None,
) -> None:
    """Makes `out` a run directory whose checkpoint is the mean, and evaluates that under the merge's name.

    The arguments are those of `choose`, and it raises as that does. The checkpoint stands at the newest one's step, and
    its optimizer has no state. Where `out` holds it already, what is left to do is done, also where the trunk has moved
    on since. With several ranks, every rank calls it: the first one merges, and all evaluate.
    """
    engine = EngineConfig()
    ranks = start_ranks(timeout=engine.timeout, rendezvous_timeout=engine.rendezvous_timeout)
    try:
        what = "merged"
        with ranks.together():
            held = held_merge(run, which, shape=shape, out=out, step=step, min_lr=min_lr) if ranks.rank == 0 else None
            if held is not None:
                check_ranks(held.config, ranks.world_size)
                with alone_in(out, "another run"):
                    _publish_run(out, held.lineage, held.config)
                what = already(held)
            elif ranks.rank == 0:
                chosen = choose(run, which, shape=shape, warn=warn, step=step, min_lr=min_lr)
                check_ranks(chosen.newest.config, ranks.world_size)
                with alone_in(out, "another run"):
                    publish_merge(chosen, out)
        _evaluate(out, ranks, what)
    finally:
        stop_ranks()


def already(held: Checkpoint) -> str:
    """What is said of a merge that was there."""
    record = held.lineage.events[-1]
    steps = ", ".join(f"{each.step}" for each in record.checkpoints) if isinstance(record, MergeRecord) else ""
    return f"merged already, from steps {steps}; for a newer one name another folder with --out"


def publish_merge(chosen: Merge, out: Path) -> None:
    """Makes `out` a run directory with the merged checkpoint; ConfigError where it holds something else."""
    check_no_data(out)
    newest, record = chosen.newest, chosen.record()
    config = dataclasses.replace(
        newest.config,
        run_dir=str(out),
        start_from=place_of(newest),
        phases=newest.config.phases[: newest.state.phase + 1],
    )
    lineage = newest.lineage.with_event(record)
    for held in list_checkpoints(out):
        if load_lineage(held) != lineage:
            raise ConfigError(f"{out} holds another model, {held}; name another folder with --out.")
    if newest_checkpoint(out, lambda line: None) is None:
        if (out / "config.yaml").is_file():
            raise ConfigError(f"{out} holds a run that is no such merge; name another folder with --out.")
        sweep_unfinished(out / "checkpoints")
        state = RunState(step=newest.state.step, phase=newest.state.phase, samples=newest.state.samples, phase_end=True)
        folders = [checkpoint.path for checkpoint in chosen.checkpoints]
        publish_checkpoint(
            checkpoint_path(out, state.step),
            lambda folder: merge_files(folders, chosen.weights, folder),
            state,
            lineage=lineage,
            config=config,
            tokenizer=newest.tokenizer(),
        )
    _publish_run(out, lineage, config)


def _publish_run(out: Path, lineage: Lineage, config: RunConfig) -> None:
    save_lineage(lineage, out)
    publish_text(out / "config.yaml", dump(config), "the configuration")


def _evaluate(out: Path, ranks: Ranks, what: str) -> None:
    """Records the held-out losses of the merged checkpoint that are not recorded yet; then says `what` became of it.

    Every rank calls it.
    """
    with ranks.together():
        checkpoint = open_checkpoint(list_checkpoints(out)[-1])
        config = checkpoint.config
        # One rank reads the lists of shards, which may be long, and gives them to the others.
        opened = open_sources(config, Origin(config, checkpoint, None, checkpoint.lineage)) if ranks.rank == 0 else None
    opened = ranks.broadcast(opened)
    with ranks.together():
        sources, problems = sources_of(checkpoint.lineage, opened.named, opened.history, shard_cache(config))
    log = RunLog(out, rank=ranks.rank, every_steps=config.logging.every_steps, tensorboard=config.logging.tensorboard)
    for problem in problems:
        log.warn(f"not evaluated: {problem}")
    done = ranks.broadcast(log.evaluated_at(checkpoint.state.step))
    owed = {name: source for name, source in sources.items() if name not in done}
    try:
        if owed:
            engine, ranks = engine_of(checkpoint, ranks)
            results = evaluate_sources(
                engine,
                ranks,
                owed,
                seq_length=config.seq_length,
                micro_batch_size=config.evaluation.micro_batch_size,
                sequences=config.evaluation.sequences,
            )
            merged = checkpoint.lineage.events[-1]
            assert isinstance(merged, MergeRecord)
            record_evaluation(log, checkpoint.lineage, results, step=checkpoint.state.step, phase=merged.name, at="end")
            with ranks.together():
                log.flush()
        log.say(f"{checkpoint.path}: {what}")
    finally:
        log.close()
