"""This rank's part of each global batch, read ahead in the background.

    loader = Loader(stream, batch_size=1104, rank=rank, world_size=world_size, vocab_size=50304)
    for batch in loader:            # until the phase's budget is used up
        engine.step(batch.tokens, lr)

Batch k is samples [k B, (k + 1) B) of the phase; rank r of W reads the r-th of W equal slices. So the batch is the same
on any number of ranks, and after any resume: the loader's whole state is the number of samples handed out.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megacl.data.order import Int64
from megacl.data.shards import Source
from megacl.data.stream import PhaseStream
from megacl.errors import ConfigError, DataError, on_this_rank

_AHEAD = 2
"""Batches read ahead: one being used, one ready, one under way."""


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


class Loader:
    """Iterates over a phase's batches from its state on; iterating again goes on from there."""

    def __init__(self, stream: PhaseStream, *, batch_size: int, rank: int, world_size: int, vocab_size: int) -> None:
        """batch_size: sequences of the global batch. vocab_size: rows of the model's embedding.

        Raises ConfigError where the batch does not divide by the ranks.
        """
        if batch_size % world_size:
            raise ConfigError(
                f"global_batch_size is {batch_size}; it must be a multiple of the number of ranks, {world_size}."
            )
        self._stream = stream
        self._batch_size = batch_size
        self._rows = batch_size // world_size
        self._rank = rank
        self._vocab_size = vocab_size
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        """{"samples": how many samples of the phase have been handed out}, the same on every rank."""
        return {"samples": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state` was taken, under any number of ranks."""
        self._next = state["samples"]

    def _read(self, first: int) -> Batch:
        start = first + self._rank * self._rows
        samples = np.arange(start, start + self._rows, dtype=np.int64)
        tokens = self._stream.read(samples)
        row = int(tokens.max(axis=1).argmax())
        if int(tokens[row].max()) >= self._vocab_size:
            source = self._stream.sources[int(self._stream.locate(samples[row : row + 1]).source[0])]
            check_tokens(tokens[row], self._vocab_size, source)
        return Batch(first, samples, tokens)

    def __iter__(self) -> Iterator[Batch]:
        budget = self._stream.record.budget_samples
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=_AHEAD)
        stop = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read_ahead(first: int) -> None:
            try:
                with on_this_rank():
                    while first + self._batch_size <= budget and not stop.is_set():
                        put(self._read(first))
                        first += self._batch_size
            except BaseException as error:  # raised again where the batch is asked for
                put(error)

        thread = threading.Thread(target=read_ahead, args=(self._next,), name="megacl-loader", daemon=True)
        thread.start()
        try:
            while self._next + self._batch_size <= budget:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                self._next = item.first_sample + self._batch_size
                yield item
        finally:
            stop.set()
            thread.join()
