"""A step begins when every rank has its part of the batch; until then all hear what befalls one of them.

with loader.reading() as poll:
    found = next_batch(poll, ranks, stop, saves)    # (batch, targets of the global batch), or None: told to stop
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from megacl.data.loader import Batch
from megacl.errors import DataError, FencedError, MegaclError
from megacl.parallel.ranks import Ranks
from megacl.stopping import StopSignal

_LOOK = 0.5
"""Seconds between two looks at what other ranks and signals say, while a rank waits for its next batch."""


class Saves(Protocol):
    """What is asked of a run's saves; see saves.py."""

    @property
    def written(self) -> bool:
        """Whether this rank has done its part of the save under way, or has failed to."""

    def advance(self) -> None:
        """Takes the save under way a step on, where all ranks have done their parts."""

    def finish(self) -> None:
        """Saves where the run stands, and waits for it."""


def next_batch(
    poll: Callable[[float | None], Batch | None],
    ranks: Ranks,
    stop: StopSignal,
    saves: Saves,
    permit: Callable[[], None] = lambda: None,
    *,
    arrived: Callable[[], int] = lambda: 0,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Batch, int] | None:
    """The next batch, once every rank has its part, and how many tokens all of it predicts; None if told to stop.

    So long as one rank waits for its data, all come together here now and then: a signal is heard on any of them,
    and no collective of a step waits for a store. Where a rank cannot read its part, all save and raise its error. A
    save under way is taken on here, so that ranks agree on the step without asking any more often.
    permit: called on rank 0; the FencedError that it raises is raised on all ranks, and nothing is saved.
    arrived: how much of this rank's data has come so far, from wherever it is. progress: called on all ranks while more
    of it comes to any of them.
    """
    before = arrived()
    batch: Batch | None = None
    error: MegaclError | None = None
    while True:
        fenced = _fenced(permit) if ranks.rank == 0 else None
        try:
            batch = batch or poll(_LOOK)
        except MegaclError as raised:
            error = raised
        here = arrived()
        comes, before = here != before, here
        said = [fenced is not None, stop.received, error is not None, batch is not None, batch.targets if batch else 0,
                saves.written, comes]  # fmt: skip
        lost, told, failed, ready, targets, written, coming = ranks.sum(np.array(said, np.float64))
        if coming:
            progress()
        if lost:
            with ranks.together():
                if fenced is not None:
                    raise fenced
        if written == ranks.world_size:
            saves.advance()
        if told:
            return None
        if failed:
            saves.finish()
            with ranks.together():
                if error is not None:
                    raise error
        if batch is not None and ready == ranks.world_size:
            # Ranks that share layers or sequences hold the same part of the batch.
            return batch, int(targets) * ranks.dp_size // ranks.world_size


def _fenced(permit: Callable[[], None]) -> FencedError | None:
    """What says that the run is another start's; a disk that does not answer says nothing."""
    try:
        permit()
    except FencedError as error:
        return error
    except DataError:
        pass
    return None
