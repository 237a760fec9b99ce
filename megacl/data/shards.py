"""Tokenized documents on disk: write a shard, read a source as one flat stream of tokens, verify a data folder.

A shard is an Arrow IPC stream, uncompressed, of exactly one record batch with one column, `tokens`: a row is a
document, a list of uint16 or uint32 tokens that ends with EOS. Plain pyarrow and `datasets.Dataset.from_file` open
it. megacl does not go through Arrow to read: the batch's value buffer is all documents behind one another, so a shard
is a flat memory map of that buffer, at an offset that shards.arrow records.

    source = open_source("data/english")            # reads the manifest and the list of shards, touches no shard
    source.train.tokens                             # how many there are, over all shards
    source.train.read(start=10**9, length=2049)     # uint16 [2049], a view of the file where one shard holds it
    source.train.gather(starts, length=2049)        # int64 [N, 2049]
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megacl.data.manifest import (
    DTypeName,
    ShardRow,
    Split,
    TokenizerRecord,
    fingerprint_of,
    read_manifest,
    read_rows,
    totals_of,
)
from megacl.errors import DataError
from megacl.publish import publish_bytes, sha256_of

Tokens = npt.NDArray[Any]
"""uint16 or uint32, as the manifest's dtype says."""

MAX_SHARD_TOKENS = 2**31 - 1
"""Arrow's lists count in 32 bits."""

_OPEN_SHARDS = 16384
"""Shards that a process keeps mapped, over all sources: Linux allows it 65,530 maps (vm.max_map_count) in all."""


def token_dtype(vocab_size: int) -> DTypeName:
    """The narrowest of the two types that holds every token id below vocab_size."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_shard(
    path: Path, documents: Sequence[Tokens], dtype: DTypeName, *, split: Split, text_bytes: int
) -> ShardRow:
    """Publishes a shard and returns its row for shards.arrow, whose path is the file's name.

    documents: at least one; each the tokens of one document, EOS at its end, all of them below 2^16 for uint16.
    text_bytes: UTF-8 bytes of the documents' raw text. Raises ValueError for no documents or more than 2^31 - 1
    tokens, and DataError if the disk refuses.
    """
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    if not documents or offsets[-1] > MAX_SHARD_TOKENS:
        raise ValueError(f"a shard holds 1 document or more and at most {MAX_SHARD_TOKENS} tokens, not {offsets[-1]}")
    values = np.concatenate(documents, dtype=dtype, casting="same_kind")

    # From buffers: pa.array() would import pandas where that is installed, which takes a second.
    value_type = pa.from_numpy_dtype(np.dtype(dtype))
    flat = pa.Array.from_buffers(value_type, len(values), [None, pa.py_buffer(values)])
    lists = pa.Array.from_buffers(
        pa.list_(value_type), len(documents), [None, pa.py_buffer(offsets.astype(np.int32))], children=[flat]
    )
    batch = pa.RecordBatch.from_arrays([lists], ["tokens"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue()
    publish_bytes(path, content, "a shard")
    return ShardRow(
        path=path.name,
        split=split,
        documents=len(documents),
        tokens=len(values),
        text_bytes=text_bytes,
        size=content.size,
        offset=_value_buffer(_only_batch(content)).address - content.address,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _only_batch(content: Any) -> Any:
    """The record batch of a shard's bytes; ValueError if there is not exactly one, pa.ArrowInvalid if garbled."""
    stream = pa.ipc.open_stream(content)
    batches = list(stream)
    if len(batches) != 1:
        raise ValueError(f"it holds {len(batches)} record batches, not one")
    return batches[0]


def _value_buffer(batch: Any) -> Any:
    # The buffers of a list column: validity and offsets of the list, validity and data of its values.
    return batch.column(0).buffers()[3]


class _BadShardError(Exception):
    """The message says what is wrong with a shard's file, and `remedy` what to do."""

    def __init__(
        self, problem: str, remedy: str = "Restore the file from a copy, or prepare the source again."
    ) -> None:
        super().__init__(problem)
        self.remedy = remedy


def _map_batch(file: Path, row: ShardRow, dtype: DTypeName) -> Any:
    """The record batch of a shard, mapped; _BadShardError if its size or header (not its tokens) is not as in its row.

    Its map holds no open file, unlike numpy's: a process may have far fewer files open than maps.
    """
    try:
        mapped = pa.memory_map(str(file))
    except FileNotFoundError:
        raise _BadShardError("the shard is missing") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        remedy = "Look at its permissions and at the process's limits (ulimit -a)."
        raise _BadShardError(f"the shard cannot be opened: {reason}", remedy) from None
    with mapped:
        if mapped.size() != row.size:
            raise _BadShardError(
                f"the shard has {mapped.size()} bytes, but shards.arrow says {row.size}; it is truncated or not the "
                "same file"
            )
        content = mapped.read_buffer()
    try:
        batch = _only_batch(content)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise _BadShardError(f"the shard is not readable as an Arrow stream ({reason})") from None
    expected = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)))
    if batch.schema.names != ["tokens"] or batch.schema.types != [expected]:
        raise _BadShardError(f"the shard's columns are {batch.schema.names}, not one of type {expected} named tokens")
    found = (batch.num_rows, len(batch.column(0).values), _value_buffer(batch).address - content.address)
    if found != (row.documents, row.tokens, row.offset):
        raise _BadShardError(
            f"the shard holds {found[0]} documents and {found[1]} tokens at byte {found[2]}, but shards.arrow says "
            f"{row.documents} and {row.tokens} at {row.offset}"
        )
    return batch


class TokenStream:
    """All documents of a split behind one another, in the order of the rows, as one sequence of tokens.

    Nothing is opened before the first read. A shard's size and header are compared with its row when it is first
    read: DataError names the file. Positions count tokens from 0 to `tokens`; outside that, ValueError.
    """

    def __init__(self, folder: Path, rows: Sequence[ShardRow], dtype: DTypeName) -> None:
        self.folder, self.rows, self.dtype = folder, tuple(rows), dtype
        self.documents = sum(row.documents for row in rows)
        self.text_bytes = sum(row.text_bytes for row in rows)
        counts = np.array([row.tokens for row in rows], np.int64)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self.tokens = int(counts.sum())

    def read(self, start: int, length: int) -> Tokens:
        """Tokens [start, start + length): [length], of the shards' own type, read-only; a copy only across shards."""
        self._check(start, start, length)
        if length == 0:
            return np.empty(0, self.dtype)
        parts = list(self._parts(start, length, int(np.searchsorted(self._ends, start, side="right"))))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def gather(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + length) for each of N starts: int64 [N, length]."""
        result = np.empty((len(starts), length), np.int64)
        if result.size == 0:
            return result
        self._check(int(starts.min()), int(starts.max()), length)
        first = np.searchsorted(self._ends, starts, side="right")
        last = np.searchsorted(self._ends, starts + (length - 1), side="right")
        local = starts - self._starts[first]
        inside = first == last
        for row, shard, begin, whole in zip(
            result, first.tolist(), local.tolist(), inside.tolist(), strict=True
        ):  # one copy of `length` tokens each, widened on the way
            if whole:
                row[:] = _open_shard(self, shard)[begin : begin + length]
        for index in np.flatnonzero(~inside).tolist():
            np.concatenate(list(self._parts(int(starts[index]), length, int(first[index]))), out=result[index])
        return result

    def _check(self, lowest: int, highest: int, length: int) -> None:
        if lowest < 0 or length < 0 or highest + length > self.tokens:
            raise ValueError(
                f"tokens [{lowest}, {highest + length}) are asked for; {self.folder} has [0, {self.tokens})"
            )

    def _parts(self, start: int, length: int, shard: int) -> Iterator[Tokens]:
        """The tokens as one piece a shard that they lie in; `shard` is the one that holds `start`."""
        while length > 0:
            begin = start - int(self._starts[shard])
            part = _open_shard(self, shard)[begin : begin + length]
            yield part
            start, length, shard = start + len(part), length - len(part), shard + 1


# One for the whole process, since the limit is the process's. Keyed by the stream itself, not by its folder's name,
# where other shards may lie by then; so a stream that was given up stays until newer shards push its own out.
@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(stream: TokenStream, shard: int) -> Tokens:
    """The tokens of one of the stream's shards, read-only; DataError if it is damaged or cannot be opened."""
    row = stream.rows[shard]
    file = stream.folder / row.path
    try:
        batch = _map_batch(file, row, stream.dtype)
    except _BadShardError as error:
        raise DataError(f"{file}: {error}. {error.remedy}") from None
    return np.frombuffer(_value_buffer(batch), stream.dtype, row.tokens)


@dataclass(frozen=True)
class Source:
    """One generation of a data folder, ready to read."""

    name: str
    path: Path
    generation: int
    fingerprint: str
    dtype: DTypeName
    tokenizer_fingerprint: str
    tokenizer_file: Path
    vocab_size: int  # of the tokenizer: every token is below it
    eos_id: int
    train_documents: int
    train: TokenStream
    validation: TokenStream


def open_source(path: str | Path, generation: int | None = None) -> Source:
    """Opens a data folder at a generation, the last one if None, without touching a shard.

    DataError if the folder, its manifest or its list of shards is missing or damaged, or has no such generation.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    state = manifest.at(generation, folder)
    rows = read_rows(folder, state.shards)
    if fingerprint_of(manifest.tokenizer.fingerprint, manifest.dtype, rows) != state.fingerprint:
        raise DataError(
            f"{folder}: the list of shards is not the one that generation {state.generation} was made with: its "
            "fingerprint differs. Restore both files from one copy, or prepare the folder again."
        )
    return Source(
        name=manifest.source,
        path=folder,
        generation=state.generation,
        fingerprint=state.fingerprint,
        dtype=manifest.dtype,
        tokenizer_fingerprint=manifest.tokenizer.fingerprint,
        tokenizer_file=folder / manifest.tokenizer.file,
        vocab_size=manifest.tokenizer.vocab_size,
        eos_id=manifest.tokenizer.eos_id,
        train_documents=state.train.documents,
        train=TokenStream(folder, [row for row in rows if row.split == "train"], manifest.dtype),
        validation=TokenStream(folder, [row for row in rows if row.split == "validation"], manifest.dtype),
    )


def verify_source(
    path: str | Path, generation: int | None = None, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Reads every byte of a generation and returns what is wrong with it, a line a problem; [] if nothing is.

    Checked: the counts and the fingerprint of the manifest, the tokenizer's file, and of every shard the size, the
    header, the hash, that every token is below the vocabulary's size and that every document ends with EOS.
    progress is called with the bytes done and the bytes in all. DataError if there is nothing to verify: no manifest
    or no list of shards that can be read.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    state = manifest.at(generation, folder)
    rows = read_rows(folder, state.shards)
    tokenizer = manifest.tokenizer
    problems = []
    if fingerprint_of(tokenizer.fingerprint, manifest.dtype, rows) != state.fingerprint:
        problems.append(f"{folder}: the fingerprint of generation {state.generation} is not that of its shards")
    if (totals_of(rows, "train"), totals_of(rows, "validation")) != (state.train, state.validation):
        problems.append(f"{folder}: the counts of generation {state.generation} are not those of its shards")
    tokenizer_file = folder / tokenizer.file
    if not tokenizer_file.is_file():
        problems.append(f"{tokenizer_file}: the tokenizer's file is missing")
    elif sha256_of(tokenizer_file) != tokenizer.fingerprint:
        problems.append(f"{tokenizer_file}: it is not the tokenizer that made the shards")
    done, total = 0, sum(row.size for row in rows)
    for row in rows:
        file = folder / row.path
        try:
            if problem := _damage(file, row, manifest.dtype, tokenizer):
                problems.append(f"{file}: {problem}")
        except OSError as error:
            problems.append(f"{file}: the shard cannot be read: {error.strerror}")
        done += row.size
        if progress:
            progress(done, total)
    return problems


def _damage(file: Path, row: ShardRow, dtype: DTypeName, tokenizer: TokenizerRecord) -> str | None:
    """What is wrong with a shard, every byte of it read, or None."""
    try:
        buffers = _map_batch(file, row, dtype).column(0).buffers()
    except _BadShardError as error:
        return str(error)
    if sha256_of(file) != row.sha256:
        return "its hash is not the one in shards.arrow; it was changed or damaged"
    ends = np.frombuffer(buffers[1], np.int32)[1:]
    values = np.frombuffer(buffers[3], dtype)
    if int(values.max()) >= tokenizer.vocab_size:
        return f"it holds token {values.max()}, but the vocabulary has {tokenizer.vocab_size} tokens"
    if not (values[ends - 1] == tokenizer.eos_id).all():
        return "a document in it does not end with EOS"
    return None
