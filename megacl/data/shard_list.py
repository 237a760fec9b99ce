"""The list of a data folder's shards, shards.arrow: a row a shard, kept in Arrow's columns.

    shards = read_shards(Path("data/english")).at(3)      # the rows of generation 3
    shards.numbers("tokens")                              # int64 [rows]

A row says in which generation its shard came and in which one it went, if it did; generation N is the rows that had
come and not gone by then, in their order. Of a list of 100,000 shards a reader needs a few arrays, not objects.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from megacl.errors import DataError

SHARDS = "shards.arrow"

Split = Literal["train", "validation"]
DTypeName = Literal["uint16", "uint32"]
Count = Annotated[int, Field(ge=0)]
Chosen = npt.NDArray[np.int64]
"""Numbers of rows, in order."""
Mask = npt.NDArray[np.bool_]
"""Which rows, or which documents."""

STRICT = ConfigDict(extra="forbid")
_REMEDY = "Restore it from a copy, or prepare the folder again."


def table_schema(**columns: Any) -> Any:
    """The schema of columns without nulls."""
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def parse_table(content: Any, schema: Any, file: Path | str, what: str) -> Any:
    """The table in the content of a file; DataError, naming the file and `what` it is, if it is None or damaged."""
    if content is None:
        raise DataError(f"{file}: {what} is missing. {_REMEDY}")
    try:
        table = pa.ipc.open_stream(content).read_all()
    except (pa.ArrowException, OSError):
        table = None
    if table is None or not table.schema.equals(schema):
        raise DataError(f"{file}: {what} is damaged. {_REMEDY}")
    return table


def dump_table(table: Any) -> bytes:
    """The content of a file that holds a table: an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


_ROW_SCHEMA = table_schema(
    path=pa.string(),
    split=pa.string(),
    documents=pa.int64(),
    tokens=pa.int64(),
    text_bytes=pa.int64(),
    size=pa.int64(),
    offset=pa.int64(),
    sha256=pa.binary(32),
    added=pa.int32(),
    removed=pa.int32(),
)


@dataclass(frozen=True, config=STRICT)
class ShardRow:
    """One shard: where it lies, what it holds, and what its file must look like."""

    path: str  # relative to the data folder
    split: Split
    documents: Count
    tokens: Count  # every document's EOS included
    text_bytes: Count  # UTF-8 bytes of the raw text
    size: Count  # bytes of the file
    offset: Count  # byte offset of the token values in the file
    sha256: str
    added: Count = 0  # the generation in which it came; 0: none yet
    removed: Count = 0  # the generation in which it went; 0: none so far


@dataclass(frozen=True, config=STRICT)
class Totals:
    """Sums over the shards of one split in one generation."""

    documents: Count
    tokens: Count
    text_bytes: Count


class ShardList:
    """Rows of shards.arrow, in order, as columns. It pickles, so that one process can read it for others."""

    def __init__(self, table: Any, chosen: Chosen | None = None) -> None:
        """table: a pyarrow Table of shards.arrow's columns. chosen: which of its rows these are; None: all."""
        self._table = table.combine_chunks()
        self._chosen = chosen

    @classmethod
    def of_rows(cls, rows: Sequence[ShardRow]) -> "ShardList":
        """The list of some rows."""
        trees = [{**vars(row), "sha256": bytes.fromhex(row.sha256)} for row in rows]
        trees = [{name: tree[name] for name in _ROW_SCHEMA.names} for tree in trees]
        return cls(pa.Table.from_pylist(trees, schema=_ROW_SCHEMA))

    @classmethod
    def concat(cls, lists: Sequence["ShardList"]) -> "ShardList":
        """The rows of some lists, behind one another."""
        return cls(pa.concat_tables([_ROW_SCHEMA.empty_table(), *(each._whole() for each in lists)]))

    def __len__(self) -> int:
        return int(self._table.num_rows) if self._chosen is None else len(self._chosen)

    def __iter__(self) -> Iterator[ShardRow]:
        return (self.row(index) for index in range(len(self)))

    def row(self, index: int) -> ShardRow:
        """One row."""
        if self._chosen is not None:
            index = int(self._chosen[index])
        tree = {name: self._table.column(name)[index].as_py() for name in _ROW_SCHEMA.names}
        return ShardRow(**{**tree, "sha256": tree["sha256"].hex()})

    def numbers(self, column: str) -> npt.NDArray[Any]:
        """A column of integers, int64 or int32 [rows]; a view where these are all rows of the file."""
        array = self._array(column)
        return self._rows_of(array, 1, np.dtype(f"int{array.type.bit_width}"))

    def _array(self, column: str) -> Any:
        chunks = self._table.column(column).chunks
        return chunks[0] if chunks else pa.array([], self._table.schema.field(column).type)

    def _rows_of(self, array: Any, buffer: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """One of an Arrow array's buffers as far as it belongs to these rows: [rows]."""
        if not len(array):
            return np.empty(0, dtype)
        values = np.frombuffer(array.buffers()[buffer], dtype, len(array), array.offset * dtype.itemsize)
        return values if self._chosen is None else values[self._chosen]

    def paths(self) -> list[str]:
        """The column of paths."""
        found: list[str] = self._whole().column("path").to_pylist()
        return found

    def held_out(self) -> Mask:
        """Which rows are of the validation split: bool [rows]."""
        # The first letters of the strings, since comparing strings would import pyarrow.compute: 170 ms.
        array = self._array("split")
        if not len(array):
            return np.empty(0, np.bool_)
        letters = np.frombuffer(array.buffers()[2], np.uint8)
        return np.asarray(letters[self._rows_of(array, 1, np.dtype(np.int32))] == ord("v"))

    def where(self, mask: Mask) -> "ShardList":
        """The rows of a mask, bool [rows]."""
        return self if mask.all() else self.take(np.flatnonzero(mask))

    def take(self, indices: npt.NDArray[np.int64]) -> "ShardList":
        """Some rows, in the order of the indices, int64 [N]."""
        # Not Table.take, which would import pyarrow.compute too.
        return ShardList(self._table, indices if self._chosen is None else self._chosen[indices])

    def replaced(self, **columns: Any) -> "ShardList":
        """The rows with other values in some columns: a value a row, or one value for all."""
        table = self._whole()
        for name, values in columns.items():
            position, kind = _ROW_SCHEMA.get_field_index(name), _ROW_SCHEMA.field(name)
            if np.isscalar(values):
                values = np.full(len(self), values)
            table = table.set_column(position, kind, pa.array(values, kind.type))
        return ShardList(table)

    def at(self, generation: int, since: int = 0) -> "ShardList":
        """The rows of a generation; with `since` only those of them that came after that earlier generation."""
        return self.where(self.is_at(generation) & (self.numbers("added") > since))

    def is_at(self, generation: int) -> Mask:
        """Which rows are of a generation: bool [rows]."""
        added, removed = self.numbers("added"), self.numbers("removed")
        return np.asarray((added <= generation) & ((removed == 0) | (removed > generation)))

    def until(self, generation: int) -> "ShardList":
        """The rows of all generations up to one, as they were then: what a command that makes the next one builds on.

        What an interrupted command wrote for a later generation is taken back.
        """
        kept = self.where(self.numbers("added") <= generation)
        removed = kept.numbers("removed")
        return kept.replaced(removed=np.where(removed > generation, 0, removed))

    def split(self, split: Split) -> "ShardList":
        """The rows of one split."""
        held_out = self.held_out()
        return self.where(held_out if split == "validation" else ~held_out)

    def totals(self, split: Split) -> Totals:
        """Sums over the rows of one split."""
        chosen = self.held_out() == (split == "validation")
        return Totals(**{name: int(self.numbers(name)[chosen].sum()) for name in ("documents", "tokens", "text_bytes")})

    def fingerprint(self, tokenizer: str, dtype: DTypeName) -> str:
        """Hexadecimal SHA-256 over what a token stream is made of.

        tokenizer: the tokenizer's fingerprint. Names of files and the inputs' names have no part in it, nor have
        generations, so the same text prepared in two places has one fingerprint.
        """
        facts = [("split", "u1"), ("documents", "<i8"), ("tokens", "<i8"), ("sha256", "V32")]  # 49 bytes, no gaps
        records = np.empty(len(self), np.dtype(facts))
        records["split"] = self.held_out()
        records["documents"], records["tokens"] = self.numbers("documents"), self.numbers("tokens")
        records["sha256"] = self._rows_of(self._array("sha256"), 1, np.dtype("V32"))
        return hashlib.sha256(f"{tokenizer}\n{dtype}\n".encode() + records.tobytes()).hexdigest()

    def dump(self) -> bytes:
        """The content of shards.arrow."""
        return dump_table(self._whole())

    def _whole(self) -> Any:
        """A table of these rows alone."""
        return self._table if self._chosen is None else self._table.take(pa.array(self._chosen))


def read_shards(folder: Path) -> ShardList:
    """All rows of shards.arrow, mapped. DataError if it is missing or damaged."""
    try:
        with pa.memory_map(str(folder / SHARDS)) as opened:
            return parse_shards(opened.read_buffer(), folder / SHARDS)
    except (FileNotFoundError, pa.ArrowInvalid):  # of no bytes at all there is no map
        return parse_shards(b"" if (folder / SHARDS).exists() else None, folder / SHARDS)
    except OSError:
        return parse_shards(b"", folder / SHARDS)


def parse_shards(content: Any, file: Path | str) -> ShardList:
    """The rows in the content of shards.arrow; None stands for a file that is missing."""
    shards = ShardList(parse_table(content, _ROW_SCHEMA, file, "the list of shards"))
    counts = ("documents", "tokens", "text_bytes", "size", "offset", "added", "removed")
    if any((shards.numbers(name) < 0).any() for name in counts):
        raise DataError(f"{file}: the list of shards is damaged: it has a negative count. {_REMEDY}")
    return shards
