"""Tokenized documents on disk: write a shard, read a source as one flat stream of tokens, verify a data folder.

A shard is an Arrow IPC stream, uncompressed, of exactly one record batch. A row is a document: `tokens`, a list of
uint16 or uint32 that ends with EOS, `text_bytes`, the length of its text, and `hash`, which tells the text. Plain
pyarrow and `datasets.Dataset.from_file` open it. megacl does not go through Arrow to train: the value buffer of
`tokens` is all documents behind one another, so a shard is a flat memory map of that buffer, at an offset that
shards.arrow records.

    source = open_source("data/english")            # reads the manifest and the list of shards, touches no shard
    source.train.tokens                             # how many there are, over all shards
    source.train.read(start=10**9, length=2049)     # uint16 [2049], a view of the file where one shard holds it
    source.train.gather(starts, length=2049)        # int64 [N, 2049]
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megacl.data.manifest import (
    MANIFEST,
    SHARDS,
    DTypeName,
    Generation,
    Hashes,
    Manifest,
    ShardList,
    ShardRow,
    Split,
    read_manifest,
    read_shards,
)
from megacl.errors import DataError
from megacl.publish import publish_bytes

Tokens = npt.NDArray[Any]
"""uint16 or uint32, as the manifest's dtype says."""

MAX_SHARD_TOKENS = 2**31 - 1
"""Arrow's lists count in 32 bits."""

_OPEN_SHARDS = 16384
"""Shards that a process keeps mapped, over all sources: Linux allows it 65,530 maps (vm.max_map_count) in all."""


def token_dtype(vocab_size: int) -> DTypeName:
    """The narrowest of the two types that holds every token id below vocab_size."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class Documents:
    """The documents of a shard, in order; all arrays are views or of the same length."""

    values: Tokens
    """All tokens behind one another, [tokens]."""
    offsets: npt.NDArray[np.int32]
    """Where in `values` each document begins, and the end of the last: [documents + 1]."""
    text_bytes: npt.NDArray[np.int64]
    """UTF-8 bytes of each document's raw text, [documents]."""
    hashes: Hashes
    """Of each document's text, [documents]."""

    def __len__(self) -> int:
        return len(self.hashes)

    def tokens(self, index: int) -> Tokens:
        """The tokens of one document, EOS included."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def where(self, mask: npt.NDArray[np.bool_]) -> "Documents":
        """The documents of a mask, bool [documents]; a copy."""
        lengths = np.diff(self.offsets)
        offsets = np.zeros(int(mask.sum()) + 1, np.int32)
        np.cumsum(lengths[mask], out=offsets[1:])
        return Documents(self.values[np.repeat(mask, lengths)], offsets, self.text_bytes[mask], self.hashes[mask])


def join_documents(
    tokens: Sequence[Tokens], dtype: DTypeName, *, text_bytes: Sequence[int], hashes: Sequence[int]
) -> Documents:
    """Documents one by one, all tokens of them below 2^16 for uint16, as those of a shard.

    ValueError for more than 2^31 - 1 tokens.
    """
    offsets = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum([len(each) for each in tokens], out=offsets[1:])
    if offsets[-1] > MAX_SHARD_TOKENS:
        raise ValueError(f"a shard holds at most {MAX_SHARD_TOKENS} tokens, not {offsets[-1]}")
    values = np.concatenate(tokens, dtype=dtype, casting="same_kind") if tokens else np.empty(0, dtype)
    return Documents(values, offsets.astype(np.int32), np.array(text_bytes, np.int64), np.array(hashes, np.uint64))


def write_shard(path: Path, documents: Documents, *, split: Split) -> ShardRow:
    """Publishes a shard and returns its row for shards.arrow, whose path is the file's name.

    documents: at least one, EOS at the end of each; ValueError otherwise. DataError if the disk refuses.
    """
    if not len(documents):
        raise ValueError("a shard holds at least one document")
    # From buffers: pa.array() would import pandas where that is installed, which takes a second.
    values = _array(documents.values)
    lists = pa.Array.from_buffers(
        pa.list_(values.type), len(documents), [None, pa.py_buffer(documents.offsets)], children=[values]
    )
    columns = {"tokens": lists, "text_bytes": _array(documents.text_bytes), "hash": _array(documents.hashes)}
    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue()
    publish_bytes(path, content, "a shard")
    return ShardRow(
        path=path.name,
        split=split,
        documents=len(documents),
        tokens=len(documents.values),
        text_bytes=int(documents.text_bytes.sum()),
        size=content.size,
        offset=_value_buffer(_only_batch(content)).address - content.address,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _array(values: npt.NDArray[Any]) -> Any:
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _columns(dtype: DTypeName) -> dict[str, Any]:
    return {"tokens": pa.list_(pa.from_numpy_dtype(np.dtype(dtype))), "text_bytes": pa.int64(), "hash": pa.uint64()}


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
    expected = _columns(dtype)
    if dict(zip(batch.schema.names, batch.schema.types, strict=True)) != expected:
        found_text, expected_text = (
            ", ".join(f"{name} {kind}" for name, kind in columns)
            for columns in (zip(batch.schema.names, batch.schema.types, strict=True), expected.items())
        )
        raise _BadShardError(f"the shard's columns are {found_text}, not {expected_text}")
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

    def __init__(self, folder: Path, shards: ShardList, dtype: DTypeName) -> None:
        self.folder, self.shards, self.dtype = folder, shards, dtype
        self.documents = int(shards.numbers("documents").sum())
        self.text_bytes = int(shards.numbers("text_bytes").sum())
        lengths = shards.numbers("tokens")
        self.ends = np.cumsum(lengths)
        """Where each shard's tokens end, int64 [shards]."""
        self.begins = self.ends - lengths
        """Where each shard's tokens begin, int64 [shards]."""
        self.tokens = int(self.ends[-1]) if len(shards) else 0

    def read(self, start: int, length: int) -> Tokens:
        """Tokens [start, start + length): [length], of the shards' own type, read-only; a copy only across shards."""
        self._check(start, start, length)
        if length == 0:
            return np.empty(0, self.dtype)
        parts = list(self._parts(start, length, int(np.searchsorted(self.ends, start, side="right"))))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def gather(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + length) for each of N starts: int64 [N, length]."""
        result = np.empty((len(starts), length), np.int64)
        if result.size == 0:
            return result
        self._check(int(starts.min()), int(starts.max()), length)
        first = np.searchsorted(self.ends, starts, side="right")
        last = np.searchsorted(self.ends, starts + (length - 1), side="right")
        local = starts - self.begins[first]
        inside = first == last
        for row, shard, begin, whole in zip(
            result, first.tolist(), local.tolist(), inside.tolist(), strict=True
        ):  # one copy of `length` tokens each, widened on the way
            if whole:
                row[:] = _open_shard(self, shard)[begin : begin + length]
        for index in np.flatnonzero(~inside).tolist():
            np.concatenate(list(self._parts(int(starts[index]), length, int(first[index]))), out=result[index])
        return result

    def documents_of(self, shard: int) -> Documents:
        """The documents of one shard, by its number; DataError if it is damaged or cannot be opened."""
        return open_documents(self.folder, self.shards.row(shard), self.dtype)

    def _check(self, lowest: int, highest: int, length: int) -> None:
        if lowest < 0 or length < 0 or highest + length > self.tokens:
            raise ValueError(
                f"tokens [{lowest}, {highest + length}) are asked for; {self.folder} has [0, {self.tokens})"
            )

    def _parts(self, start: int, length: int, shard: int) -> Iterator[Tokens]:
        """The tokens as one piece a shard that they lie in; `shard` is the one that holds `start`."""
        while length > 0:
            begin = start - int(self.begins[shard])
            part = _open_shard(self, shard)[begin : begin + length]
            yield part
            start, length, shard = start + len(part), length - len(part), shard + 1


# One for the whole process, since the limit is the process's. Keyed by the stream itself, not by its folder's name,
# where other shards may lie by then; so a stream that was given up stays until newer shards push its own out.
@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(stream: TokenStream, shard: int) -> Tokens:
    """The tokens of one of the stream's shards, read-only; DataError if it is damaged or cannot be opened."""
    return open_documents(stream.folder, stream.shards.row(shard), stream.dtype).values


def open_documents(folder: Path, row: ShardRow, dtype: DTypeName) -> Documents:
    """The documents of a shard, mapped, read-only; DataError if it is damaged or cannot be opened."""
    file = folder / row.path
    try:
        batch = _map_batch(file, row, dtype)
    except _BadShardError as error:
        raise DataError(f"{file}: {error}. {error.remedy}") from None
    return _documents(batch, row, dtype)


def _documents(batch: Any, row: ShardRow, dtype: DTypeName) -> Documents:
    lists, text_bytes, hashes = (batch.column(index).buffers() for index in range(3))
    return Documents(
        np.frombuffer(lists[3], dtype, row.tokens),
        np.frombuffer(lists[1], np.int32, row.documents + 1),
        np.frombuffer(text_bytes[1], np.int64, row.documents),
        np.frombuffer(hashes[1], np.uint64, row.documents),
    )


@dataclass(frozen=True)
class Source:
    """One generation of a data folder, ready to read."""

    name: str
    path: Path
    generation: int
    since: int  # what this earlier generation held is left out; 0: nothing is
    fingerprint: str
    dtype: DTypeName
    tokenizer_fingerprint: str
    tokenizer_file: Path
    vocab_size: int  # of the tokenizer: every token is below it
    eos_id: int
    held_out: float  # the part of the documents that is held out, by their hashes
    train_documents: int
    train: TokenStream
    validation: TokenStream
    window: int | None = None  # the order that its user asks for: data/sequences.py


def open_source(path: str | Path, generation: int | None = None, since: int = 0) -> Source:
    """Opens a data folder at a generation, the last one if None, without touching a shard.

    since: leave out what that earlier generation held already. DataError if the folder, its manifest or its list of
    shards is missing or damaged, has no such generation, or none of its shards is newer than `since`.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    state = manifest.at(generation, folder)
    shards = read_shards(folder).at(state.generation)
    _check_shards(folder, manifest, state, shards)
    if since:
        shards = shards.at(state.generation, since)
        if not len(shards):
            raise DataError(
                f"{folder}: generation {state.generation} has no shard that generation {since} had not. Prepare new "
                "documents into it, or lower `since`."
            )
    return Source(
        name=manifest.source,
        path=folder,
        generation=state.generation,
        since=since,
        fingerprint=shards.fingerprint(manifest.tokenizer.fingerprint, manifest.dtype) if since else state.fingerprint,
        dtype=manifest.dtype,
        tokenizer_fingerprint=manifest.tokenizer.fingerprint,
        tokenizer_file=folder / manifest.tokenizer.file,
        vocab_size=manifest.tokenizer.vocab_size,
        eos_id=manifest.tokenizer.eos_id,
        held_out=manifest.validation,
        train_documents=shards.totals("train").documents,
        train=TokenStream(folder, shards.split("train"), manifest.dtype),
        validation=TokenStream(folder, shards.split("validation"), manifest.dtype),
    )


def _check_shards(folder: Path, manifest: Manifest, state: Generation, shards: ShardList) -> None:
    if len(shards) != state.shards:
        raise DataError(
            f"{folder / SHARDS}: it lists {len(shards)} shards of generation {state.generation}, but {MANIFEST} counts "
            f"{state.shards}. Restore both files from one copy, or prepare the folder again."
        )
    if shards.fingerprint(manifest.tokenizer.fingerprint, manifest.dtype) != state.fingerprint:
        raise DataError(
            f"{folder}: the list of shards is not the one that generation {state.generation} was made with: its "
            "fingerprint differs. Restore both files from one copy, or prepare the folder again."
        )


def hash_of(text: bytes) -> int:
    """What a shard records of a document's text in UTF-8: 8 bytes of BLAKE2b, as a big-endian number."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def held_out_below(validation: float) -> int:
    """The bound below which a document's hash makes it a held-out one. validation: the part held out, in [0, 1)."""
    return int(validation * 2**64)
