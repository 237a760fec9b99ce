"""This rank's part of each global batch, read ahead in the background.

    loader = Loader(stream, batch_size=1104, rank=rank, world_size=world_size, vocab_size=50304)
    for batch in loader:            # until the phase's budget is used up
        engine.step(batch.tokens, lr)
    loader.waited                   # seconds for which the loop above had to wait for a batch

    with loader.reading() as poll:  # the same for one who has other things to look after while it waits
        batch = poll(0.5)           # None where none is ready after half a second

Batch k is samples [k B, (k + 1) B) of the phase; rank r of W reads the r-th of W equal slices. So the batch is the same
on any number of ranks, and after any resume: the loader's whole state is the number of samples handed out.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megacl.data.lookahead import LookAhead
from megacl.data.order import Int64
from megacl.data.packing import PADDING
from megacl.data.source import Source
from megacl.data.store import wanted_until
from megacl.data.stream import PhaseStream
from megacl.errors import ConfigError, DataError, on_this_rank

_AHEAD = 4
"""Reads whose batches stand ready, beside the one being used and the one under way."""
_ROWS = 128
"""Sequences that are read together where batches are smaller: most of the time to read 16 is spent on calls."""


def check_tokens(tokens: Int64, vocab_size: int, source: Source) -> None:
    """Raises DataError, naming the source, where a token has no row in an embedding of vocab_size rows."""
    if int(tokens.max()) >= vocab_size:
        raise DataError(
            f"source {source.name!r} ({source.path}) holds token id {int(tokens.max())}, but the model's "
            f"vocab_size is {vocab_size}; prepare it with the model's tokenizer."
        )


@dataclass(frozen=True)
class Batch:
    """One global batch's slice on this rank."""

    first_sample: int
    """Index of the global batch's first sample."""
    samples: Int64
    """Indices of this rank's samples, int64 [rows]."""
    tokens: Int64
    """int64 [rows, T + 1]."""
    targets: int
    """How many of them are predicted: rows T, less by the PADDING."""


class Loader:
    """Iterates over a phase's batches from its state on; iterating again goes on from there."""

    def __init__(
        self,
        stream: PhaseStream,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        vocab_size: int,
        stage: Callable[[Int64], Int64] | None = None,
    ) -> None:
        """batch_size: sequences of the global batch. vocab_size: rows of the model's embedding.

        stage: called with each batch's tokens, in the background; its result is handed out in their place.
        rank, world_size: among those that have parts of their own, the data-parallel ones. Raises ConfigError where the
        batch does not divide by them.
        """
        if batch_size % world_size:
            raise ConfigError(
                f"global_batch_size is {batch_size}; it must be a multiple of the data-parallel size, {world_size}."
            )
        self._stream = stream
        self._batch_size = batch_size
        self._rows = batch_size // world_size
        self._rank = rank
        self._vocab_size = vocab_size
        self._stage = stage
        self._next = 0
        self.waited = 0.0
        """Seconds for which whoever iterates has waited, the first batch included."""
        self.arrived = 0
        """Pieces of shards that have come from stores so far: it grows as long as something comes."""

    def state_dict(self) -> dict[str, int]:
        """{"samples": how many samples of the phase have been handed out}, the same on every rank."""
        return {"samples": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state` was taken, under any number of ranks."""
        self._next = state["samples"]

    def _read(self, first: int, count: int) -> Iterator[Batch]:
        """This rank's part of `count` batches, the first of which begins with sample `first`."""
        firsts = np.arange(count, dtype=np.int64) * self._batch_size + first
        samples = firsts[:, None] + np.arange(self._rows) + self._rank * self._rows
        tokens = self._stream.read(samples.ravel()).reshape(count, self._rows, -1)
        if int(tokens.max()) >= self._vocab_size:
            batch, row = np.unravel_index(int(tokens.max(axis=2).argmax()), samples.shape)
            source = self._stream.sources[int(self._stream.locate(samples[batch, row : row + 1]).source[0])]
            check_tokens(tokens[batch, row], self._vocab_size, source)
        for index in range(count):
            staged = self._stage(tokens[index]) if self._stage else tokens[index]
            predicted = tokens[index, :, 1:]
            targets = int(np.count_nonzero(predicted != PADDING)) if self._stream.padded else predicted.size
            yield Batch(int(firsts[index]), samples[index], staged, targets)

    def __iter__(self) -> Iterator[Batch]:
        with self.reading() as poll:
            while self._next + self._batch_size <= self._stream.record.budget_samples:
                if (batch := poll(None)) is not None:
                    yield batch

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[float | None], Batch | None]]:
        """Reads ahead inside the block: poll(seconds) gives the next batch, None where none is ready in that time.

        It may be called as often as there are batches. It raises what reading raised, on this rank alone.
        """
        budget = self._stream.record.budget_samples
        ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=_AHEAD)
        stop = threading.Event()

        def put(item: list[Batch] | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def arrives() -> None:
            self.arrived += 1  # of two threads at once one may go uncounted, which is as good

        def read_ahead(first: int) -> None:
            try:
                count = 1  # the first batch alone: somebody waits for it
                look_ahead = LookAhead(
                    self._stream,
                    first=first,
                    batch_size=self._batch_size,
                    rows=self._rows,
                    offset=self._rank * self._rows,
                    arrives=arrives,
                )
                with on_this_rank(), wanted_until(stop.is_set, arrives), look_ahead:
                    while first + self._batch_size <= budget and not stop.is_set():
                        count = min(count, (budget - first) // self._batch_size)
                        look_ahead.reached(first)
                        put(list(self._read(first, count)))
                        first += count * self._batch_size
                        count = max(1, _ROWS // self._rows)
            except BaseException as error:  # raised again where the batch is asked for
                put(error)

        batches: deque[Batch] = deque()

        def poll(seconds: float | None) -> Batch | None:
            if not batches:
                asked = time.perf_counter()
                try:
                    item = ready.get(timeout=seconds)
                except queue.Empty:
                    return None
                finally:
                    self.waited += time.perf_counter() - asked
                if isinstance(item, BaseException):
                    raise item
                batches.extend(item)
            batch = batches.popleft()
            self._next = batch.first_sample + self._batch_size
            return batch

        thread = threading.Thread(target=read_ahead, args=(self._next,), name="megacl-loader", daemon=True)
        thread.start()
        try:
            yield poll
        finally:
            stop.set()
            thread.join()
