"""Tokenized documents on disk: what a shard is, how it is written, and how its documents are read.

A shard is an Arrow IPC stream, uncompressed, of exactly one record batch. A row is a document: `tokens`, a list of
uint16 or uint32 that ends with EOS, `text_bytes`, the length of its text, and `hash`, which tells the text. Plain
pyarrow and `datasets.Dataset.from_file` open it. megacl does not go through Arrow to train: the value buffer of
`tokens` is all documents behind one another, so a shard is a flat memory map of that buffer, at an offset that
shards.arrow records.

    row = write_shard(path, documents, split="train")       # its row for shards.arrow
    documents = open_documents(folder, row, "uint16")       # mapped
    documents.tokens(7)                                     # uint16 [tokens], of document 7
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megacl.data.manifest import Hashes
from megacl.data.shard_list import DTypeName, ShardRow, Split
from megacl.data.store import RemoteFolder
from megacl.errors import DataError
from megacl.publish import publish_bytes

Tokens = npt.NDArray[Any]
"""uint16 or uint32, as the manifest's dtype says."""

MAX_SHARD_TOKENS = 2**31 - 1
"""Arrow's lists count in 32 bits."""


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


def _map_file(file: Path, row: ShardRow) -> Any:
    """The bytes of a shard, mapped; _BadShardError if there are not as many as its row says.

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
        return mapped.read_buffer()


def _batch_of(content: Any, row: ShardRow, dtype: DTypeName) -> Any:
    """The record batch in a shard's bytes; _BadShardError if its header (not its tokens) is not as its row says."""
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


def open_documents(folder: Path | RemoteFolder, row: ShardRow, dtype: DTypeName) -> Documents:
    """The documents of a shard, mapped, read-only; DataError if it is damaged, or cannot be opened or fetched."""
    try:
        content = (
            _map_file(folder / row.path, row) if isinstance(folder, Path) else pa.py_buffer(folder.open_shard(row))
        )
        return _documents(_batch_of(content, row, dtype), row, dtype)
    except _BadShardError as error:
        raise DataError(f"{folder}/{row.path}: {error}. {error.remedy}") from None


def _documents(batch: Any, row: ShardRow, dtype: DTypeName) -> Documents:
    lists, text_bytes, hashes = (batch.column(index).buffers() for index in range(3))
    return Documents(
        np.frombuffer(lists[3], dtype, row.tokens),
        np.frombuffer(lists[1], np.int32, row.documents + 1),
        np.frombuffer(text_bytes[1], np.int64, row.documents),
        np.frombuffer(hashes[1], np.uint64, row.documents),
    )


def hash_of(text: bytes) -> int:
    """What a shard records of a document's text in UTF-8: 8 bytes of BLAKE2b, as a big-endian number."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def held_out_below(validation: float) -> int:
    """The bound below which a document's hash makes it a held-out one. validation: the part held out, in [0, 1)."""
    return int(validation * 2**64)
