"""Fetches the shards of a phase's coming batches from their stores, so that the loader finds them on the local disk.

    with LookAhead(stream, first=0, batch_size=1104, rows=69, offset=0) as ahead:
        ahead.reached(2208)      # the batch that begins with this sample is about to be read

Which shards a batch needs is arithmetic, so a thread walks through the batches to come and has their shards fetched,
four at a time. It goes so far ahead that the shards from there to the batch being read take up a quarter of the cache.
What it cannot fetch, the loader meets when it gets there.
"""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np

from megacl.data.store import RemoteFolder, wanted_until
from megacl.data.stream import PhaseStream
from megacl.errors import DataError, StoppedError

_FETCHES = 4
_PART_OF_CACHE = 4
_PAUSE = 0.05
"""Seconds between two looks at how far the loader is."""
_BREATH = 0.01
"""Seconds between two batches that need nothing new, so that walking on takes nothing from the loader."""


class LookAhead:
    """A context in which shards are fetched ahead; it does nothing where no source lies on a store."""

    def __init__(
        self,
        stream: PhaseStream,
        *,
        first: int,
        batch_size: int,
        rows: int,
        offset: int,
        arrives: Callable[[], None] = lambda: None,
    ) -> None:
        """first: the sample with which the next batch begins. rows, offset: this rank's part of a batch.

        arrives: called whenever a piece of a shard has come.
        """
        self._arrives = arrives
        self._stream, self._first, self._batch_size = stream, first, batch_size
        self._rows, self._offset = rows, offset
        self._reached = first
        self._stop = threading.Event()
        self._remote = {
            index: source.folder
            for index, source in enumerate(stream.sources)
            # The shards of packed documents are all fetched to count their rows.
            if isinstance(source.folder, RemoteFolder) and not stream.padded
        }
        self._thread = threading.Thread(target=self._walk, name="megacl-look-ahead", daemon=True)

    def reached(self, first: int) -> None:
        """Says that the batch that begins with sample `first` is about to be read."""
        self._reached = first

    def __enter__(self) -> "LookAhead":
        if self._remote:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        if self._remote:
            self._thread.join()

    def _walk(self) -> None:
        room = min(folder.cache.size for folder in self._remote.values()) // _PART_OF_CACHE
        asked: dict[tuple[int, int], int] = {}  # (source, shard): the last batch that was seen to need it
        taken = 0  # bytes of these shards
        with ThreadPoolExecutor(_FETCHES, thread_name_prefix="megacl-fetch") as pool:
            budget = self._stream.record.budget_samples
            for first in range(self._first, budget - self._batch_size + 1, self._batch_size):
                if first < self._reached:
                    continue
                needed = self._needed(first)
                new = [key for key in needed if key not in asked]
                for key in new:
                    pool.submit(self._fetch, *key)
                    taken += self._size(*key)
                asked |= dict.fromkeys(needed, first)
                if not new:
                    self._stop.wait(_BREATH)
                while taken > room and first > self._reached:
                    if self._stop.wait(_PAUSE):
                        break
                    asked = {key: last for key, last in asked.items() if last >= self._reached}
                    taken = sum(self._size(*key) for key in asked)
                if self._stop.is_set():
                    break
            pool.shutdown(cancel_futures=self._stop.is_set())

    def _needed(self, first: int) -> list[tuple[int, int]]:
        """(source, shard) of the shards on stores that this rank's part of a batch lies in."""
        samples = np.arange(self._rows, dtype=np.int64) + (first + self._offset)
        located = self._stream.locate(samples)
        needed = []
        for index in self._remote:
            train = self._stream.sources[index].train
            starts = located.start[located.source == index]
            # A replayed sample may end elsewhere than where it began: then its beginning alone counts.
            starts = np.minimum(starts, train.tokens - self._stream.seq_length - 1)
            needed += [(index, shard) for shard in train.shards_of(starts, self._stream.seq_length + 1)]
        return needed

    def _size(self, source: int, shard: int) -> int:
        return int(self._stream.sources[source].train.sizes[shard])

    def _fetch(self, source: int, shard: int) -> None:
        row = self._stream.sources[source].train.shards.row(shard)
        # An error that lasts is raised where the shard is read.
        with contextlib.suppress(DataError, StoppedError), wanted_until(self._stop.is_set, self._arrives):
            self._remote[source].fetch_ahead(row)
