"""The guard over a run's updates: it sets the loss above which one is skipped, and takes the run back to a checkpoint.

    guard = Guard(config.stability, run_dir, origin, ranks, log, fp16=False)
    result = engine.step(tokens, lr, skip_above=guard.threshold(record))
    guard.judge(result, step, last_good)    # says what was wrong; DivergedError where the run cannot go on
    if guard.has_given_up:
        record = guard.go_back(engine, stream, record, step)

The rule is stability.py's. Going back stays within a phase, since what the next one replays was planned from what this
one learned from: where a phase has saved nothing yet, it is to what the phase began with.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megacl.checkpoint import Checkpoint, checkpoint_path, find_checkpoint, open_checkpoint
from megacl.config import StabilityConfig
from megacl.data.stream import PhaseStream
from megacl.engine import Engine, StepResult
from megacl.errors import CheckpointError, DivergedError
from megacl.handover import go_on, take_over
from megacl.lineage import PhaseRecord, pass_over
from megacl.log import RunLog
from megacl.parallel.ranks import Ranks
from megacl.resume import Origin
from megacl.stability import Watch, after_step, given_up, gone_back, skip_above
from megacl.starting import open_start


class Guard:
    """The guard over one run. Every rank has one, and all decide alike, since a step's result is the same on all."""

    def __init__(
        self,
        stability: StabilityConfig,
        run_dir: Path,
        origin: Origin,
        ranks: Ranks,
        log: RunLog,
        *,
        fp16: bool,
        begin_with: Callable[[Checkpoint], Checkpoint] = lambda parent: parent,
    ) -> None:
        """origin: what the run goes on from. fp16: whether a loss scale answers gradients that are not finite.

        begin_with: makes what the run began with of the model that it started from.
        """
        self._begin_with, self._ids = begin_with, origin.lineage.ids
        self._stability, self._fp16 = stability, fp16
        self._run_dir, self._ranks, self._log = run_dir, ranks, log
        state = origin.checkpoint.state if origin.checkpoint else None
        self.watch = state.watch if state else Watch()
        self.back_to = state.back_to if state else None
        """The step of the checkpoint to go back to; None where the run has saved none in turn yet.

        It may be one that is being written: who goes back has waited for it.
        """
        self.parent = str(origin.parent.path) if origin.parent else state.parent if state else None
        """The checkpoint that the run started from, to which it goes back then."""

    def threshold(self, record: PhaseRecord) -> float:
        """The loss above which the phase's next update is to be skipped."""
        if record.samples // record.global_batch_size + 1 in record.steps_of_change:
            self.watch = replace(self.watch, losses=())
        return skip_above(self.watch, self._stability)

    @property
    def has_given_up(self) -> bool:
        """Whether more updates in a row were skipped than may be."""
        return given_up(self.watch, self._stability)

    def judge(self, result: StepResult, step: int, last_good: Callable[[], str]) -> None:
        """Takes note of what a step did, and warns where its update was skipped.

        last_good: gives what to say of the last checkpoint. Raises DivergedError where it was one too many, with no way
        back.
        """
        self.watch, trouble = after_step(
            self.watch, self._stability, result.loss, applied=result.applied, fp16=self._fp16
        )
        if not trouble:
            return
        skipped, went_back = self.watch.skipped, self.watch.went_back
        somewhere = self.back_to is not None or self.parent is not None
        if self.has_given_up and not (somewhere and went_back < self._stability.go_back):
            row = f", the last of {skipped} in a row" if skipped > 1 else ""
            before = f"the run has gone back {went_back} times, and " if went_back else ""
            raise DivergedError(
                f"step {step}: {trouble}, and the update was not made{row}; {before}{last_good()}. "
                "Lower max_lr or lengthen the warm-up in a new run_dir, look at the batch's data, or let some updates "
                "be skipped (stability.skip, stability.go_back)."
            )
        self._log.warn(f"step {step}: {trouble}; its update was skipped, {skipped} in a row")

    def go_back(self, engine: Engine, stream: PhaseStream, record: PhaseRecord, step: int) -> PhaseRecord:
        """Loads the last checkpoint, and passes over the phase's samples from there to here. Every rank calls it.

        record: the phase's, after `step`. Returns it as it is then. Raises CheckpointError where the checkpoint is gone
        or damaged.
        """
        assert self.back_to is not None or self.parent is not None, "judge has looked"
        path = checkpoint_path(self._run_dir, self.back_to) if self.back_to is not None else Path(str(self.parent))
        with self._ranks.together():
            if self.back_to is None:
                parent = open_start(str(path), self._log.warn)
                if parent.lineage.ids != self._ids[: len(parent.lineage.ids)]:
                    raise CheckpointError(f"{path}: it is not what the run started from any more; put that back.")
                checkpoint = self._begin_with(parent)
            else:
                if self._ranks.rank == 0:
                    find_checkpoint(str(path), self._log.warn)  # verifies it
                checkpoint = open_checkpoint(path)
        seen = checkpoint.lineage.phases
        inside = bool(seen) and seen[-1].name == record.name
        since = checkpoint.state.samples if inside else 0
        checkpoint.load_into(engine)
        if inside:
            go_on(engine, record)
        else:
            take_over(engine, record)
        taken, now = since // record.global_batch_size, record.samples // record.global_batch_size
        changed = any(taken < begun <= now for begun in record.steps_of_change)
        self.watch = gone_back(self.watch, () if changed else checkpoint.state.watch.losses)
        self._log.warn(
            f"step {step}: too many in a row, so the run goes back to {path} and passes over samples {since:,} to "
            f"{record.samples:,} of phase {record.name!r}; {self._stability.go_back - self.watch.went_back} times more "
            "it may"
        )
        self._log.record(
            "go_back", step=step, phase=record.name, to_step=self.back_to, passed_over=[since, record.samples]
        )
        return stream.seen(record.samples, record.last_lr, pass_over(record.passed_over, since, record.samples))
