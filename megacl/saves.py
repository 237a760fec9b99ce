"""The saves of a run: when one is published, what follows on it, and what follows on one that failed.

    saves.note(state, lineage)      # where the run stands, behind each step
    saves.save()                    # begins to save that
    saves.advance()                 # where `written` is true on all ranks: towards its being published
    saves.settle()                  # waits until it is
    saves.leave()                   # where a phase begins, before the engine is changed
    saves.finish()                  # at the run's end: all that is noted is saved, or DataError says why not

Training goes on while a save is written. What others read, the run's lineage.json, retention, the checkpoint that a
run goes back to, learns of it when it is published. A save that fails does not end the run: it is said, recorded, and
the next one tries again. The last one of a run must succeed, and so must one in three.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from megacl.checkpoint import RunState
from megacl.config import RunConfig
from megacl.data.tokenizer import Tokenizer
from megacl.engine import Engine
from megacl.errors import DataError, DivergedError
from megacl.guard import Guard
from megacl.lineage import Lineage, save_lineage
from megacl.log import RunLog
from megacl.parallel.ranks import Ranks
from megacl.retention import prune_checkpoints
from megacl.saving import Saved, Saving

MOST_FAILURES = 3
"""Saves in a row that have failed when the run ends."""
_PATIENCE = 60.0
"""Seconds between two words about a save that is waited for. A mount that is lost may refuse nothing, and be silent."""


class Saves:
    """The saves of one run, on one rank. Every rank has one, and calls it alike."""

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        guard: Guard,
        log: RunLog,
        *,
        config: RunConfig,
        tokenizer: Tokenizer,
        last_good: Path | None,
        permit: Callable[[], None] = lambda: None,
        resting: Callable[[str], contextlib.AbstractContextManager[None]] = lambda doing: contextlib.nullcontext(),
    ) -> None:
        """last_good: the checkpoint that the run goes on from, if it is its own. permit: as of `Saving`.

        resting: entered, with what is done, around what may take as long as a disk likes.
        """
        self._resting = resting
        self._ranks, self._guard, self._log, self._config = ranks, guard, log, config
        self._run_dir = Path(config.run_dir)
        self._permit = permit
        self._saving = Saving(engine, ranks, self._run_dir, config=config, tokenizer=tokenizer, permit=permit)
        self._unsaved: tuple[RunState, Lineage] | None = None  # where the run stands, if no checkpoint stands there
        self._under_way: tuple[RunState, Lineage] | None = None
        self._back_to = guard.back_to  # as of what is published
        self._waited = 0.0
        self._failed = 0
        self._error: DataError | None = None  # of the last one that failed
        self._left: DataError | None = None  # why it is not saved where the engine was left, if nothing is noted since
        self.last_good = last_good
        """The run's last published checkpoint."""

    @property
    def written(self) -> bool:
        """Whether this rank has done its part of what is under way, or has failed to."""
        return self._saving.written

    def note(self, state: RunState, lineage: Lineage) -> None:
        """Says where the run stands, which no checkpoint does yet."""
        self._unsaved, self._left = (state, lineage), None

    def leave(self) -> None:
        """Says that the engine is to be changed where the run stands: what could not be saved there cannot be any more.

        A run that ends before it notes another place raises in `finish` why.
        """
        if self._unsaved is not None:
            self._unsaved, self._left = None, self._error

    def save(self) -> None:
        """Begins to save what was noted last, unless it is saved. Raises as `settle` does."""
        self.settle()
        if self._unsaved is None:
            return
        begun = time.perf_counter()
        with self._resting(f"sending the state of step {self._unsaved[0].step} to who saves it"):
            self._saving.begin(*self._unsaved)
        self._under_way, self._unsaved = self._unsaved, None
        self._waited = time.perf_counter() - begun

    def finish(self) -> None:
        """Saves what is not saved yet, and waits for it. Raises DataError where that fails, DivergedError."""
        self.save()
        self.settle(last=True)
        if self._left is not None:
            raise self._left

    def settle(self, *, last: bool = False) -> None:
        """Waits until the save under way is published, if there is one.

        last: raise DataError where it failed; else only where too many in a row have. Raises DivergedError where a
        number in it is not finite.
        """
        while self._under_way is not None:
            self._wait(self._under_way[0].step)
            self.advance(last=last)

    def _wait(self, step: int) -> None:
        """Waits until `written` is true on all ranks, and says now and then that it does."""
        begun = time.perf_counter()
        with self._resting(f"waiting for the save of step {step}"):
            while not all(self._ranks.gather(self._saving.wait(_PATIENCE))):
                seconds = time.perf_counter() - begun
                self._log.warn(f"step {step}: its save is waited for, {seconds:.0f} s by now; is the disk there?")
        self._waited += time.perf_counter() - begun

    def advance(self, *, last: bool = False) -> None:
        """Takes the save under way a step on, if there is one, where `written` is true on all ranks. As `settle`."""
        if self._under_way is not None:
            with self._resting(f"publishing the save of step {self._under_way[0].step}"):
                self._advance(last=last)

    def _advance(self, *, last: bool) -> None:
        assert self._under_way is not None
        begun = time.perf_counter()
        try:
            saved = self._saving.advance(self._log.flush, self._log.sync)  # a resume needs the records up to there
        except DataError as error:
            (state, lineage), self._under_way = self._under_way, None
            self._lost(state, lineage, error, last=last)
            return
        except DivergedError:
            self._under_way = None
            raise
        self._waited += time.perf_counter() - begun
        if saved is not None:
            self._under_way = None
            self._published(saved, last=last)

    def _published(self, saved: Saved, *, last: bool) -> None:
        self._failed, self.last_good = 0, saved.path
        self._back_to = self._guard.back_to = saved.state.back_to
        waited = self._waited + saved.held_up
        self._log.record(
            "save", step=saved.state.step, bytes=saved.size, seconds=saved.seconds, waited=waited, error=None
        )
        try:
            with self._ranks.together():
                if self._ranks.rank == 0:
                    save_lineage(saved.lineage, self._run_dir, self._permit)
                    prune_checkpoints(self._run_dir, saved.path, self._config.checkpoint, self._log.warn, self._permit)
        except DataError as error:  # the next one writes it again
            if last:
                raise
            self._log.warn(str(error))

    def _lost(self, state: RunState, lineage: Lineage, error: DataError, *, last: bool) -> None:
        self._failed += 1
        self._error = error
        self._guard.back_to = self._back_to
        if self._unsaved is None:
            self._unsaved = state, lineage
        else:  # it would go back to the one that was lost
            self._unsaved = dataclasses.replace(self._unsaved[0], back_to=self._back_to), self._unsaved[1]
        self._log.record("save", step=state.step, bytes=None, seconds=None, waited=None, error=str(error))
        if last:
            raise error
        if self._failed == MOST_FAILURES:
            raise DataError(f"{self._failed} saves in a row have failed, at last: {error}")
        self._log.warn(
            f"step {state.step} is not saved: {error} Training goes on, the next save tries again, and the run ends "
            f"after {MOST_FAILURES} failures in a row; this was {self._failed}"
        )

    def abandon(self) -> None:
        """Gives up the save under way, if there is one. No collective."""
        self._saving.abandon()
