"""What a data folder holds: manifest.json (small), shards.arrow (a row a shard), inputs.arrow and removed.arrow.

docs/data.md describes them to the byte. In short: a row of shards.arrow says in which generation its shard came and in
which one it went, if it did; generation N is the rows that had come and not gone by then, in their order. So preparing
more files or removing documents makes a generation and leaves the earlier ones as they were. The manifest is published
last, so rows of a generation that it does not count are those of a command that was interrupted; readers never look at
them. Only commands that change a folder read inputs.arrow and removed.arrow.

A list of 100,000 shards stays in Arrow's columns: what a reader needs of it is a few arrays, not objects.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megacl.errors import DataError
from megacl.publish import publish_bytes, publish_text

FORMAT: Literal["megacl-data"] = "megacl-data"
VERSION: Literal[2] = 2
MANIFEST = "manifest.json"
SHARDS = "shards.arrow"
INPUTS = "inputs.arrow"
REMOVED = "removed.arrow"

Split = Literal["train", "validation"]
DTypeName = Literal["uint16", "uint32"]
MadeBy = Literal["prepare", "remove", "dedup"]
Count = Annotated[int, Field(ge=0)]
Hashes = npt.NDArray[np.uint64]
"""The first 8 bytes of BLAKE2b (with a digest of 8 bytes) of documents' texts in UTF-8, as big-endian numbers."""
Chosen = npt.NDArray[np.int64]
"""Numbers of rows, in order."""

_STRICT = ConfigDict(extra="forbid")
_REMEDY = "Restore it from a copy, or prepare the folder again."


def _schema(**columns: Any) -> Any:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


_ROW_SCHEMA = _schema(
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
_INPUT_SCHEMA = _schema(name=pa.string(), size=pa.int64(), sha256=pa.binary(32), generation=pa.int32())
_REMOVED_SCHEMA = _schema(hash=pa.uint64(), generation=pa.int32())


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class Totals:
    """Sums over the shards of one split in one generation."""

    documents: Count
    tokens: Count
    text_bytes: Count


@dataclass(frozen=True, config=_STRICT)
class InputFile:
    """A raw input as it was when it was read: its name as given, its bytes, and their hash."""

    name: str
    size: Count
    sha256: str
    generation: Count = 0  # the generation that it was added by; 0: none yet


@dataclass(frozen=True, config=_STRICT)
class Generation:
    """One state of the folder, and how it came about. Counts of shards and totals are over the whole state."""

    generation: Annotated[int, Field(ge=1)]
    shards: Annotated[int, Field(ge=1)]
    train: Totals
    validation: Totals
    fingerprint: str
    made_by: MadeBy
    settings: dict[str, str | int | float | bool]  # of the command that made it, as far as they shape its documents
    bad_lines: Count = 0  # lines that were left out of what it added
    empty_documents: Count = 0  # documents without text that were left out of what it added
    removed_documents: Count = 0  # documents that were left out or taken out as duplicates or on request
    purged_by: Count = 0  # the generation that deleted shards of this one from the disk; 0: all are there


@dataclass(frozen=True, config=_STRICT)
class TokenizerRecord:
    """The tokenizer that all shards of the folder were made with; its file lies in the folder."""

    file: str
    fingerprint: str
    vocab_size: Annotated[int, Field(ge=1)]
    eos_id: Count


@dataclass(frozen=True, config=_STRICT)
class Manifest:
    """The content of manifest.json."""

    format: Literal["megacl-data"]
    version: Literal[2]
    source: str
    dtype: DTypeName
    tokenizer: TokenizerRecord
    validation: Annotated[float, Field(ge=0, lt=1)]  # the part of the documents that is held out
    generations: Annotated[tuple[Generation, ...], Field(min_length=1)]

    def at(self, generation: int | None, folder: object) -> Generation:
        """A generation, the last one if None; DataError, naming the folder, if there is none such, or it was purged."""
        if generation is None:
            return self.generations[-1]
        if not 1 <= generation <= len(self.generations):
            raise DataError(
                f"{folder}/{MANIFEST}: generation {generation} is asked for, but the folder has 1 to "
                f"{len(self.generations)}. Name one of these, or prepare the missing files into it."
            )
        state = self.generations[generation - 1]
        if state.purged_by:
            raise DataError(
                f"{folder}: generation {generation} cannot be read any more: documents of it were purged from the disk "
                f"by generation {state.purged_by}. Name generation {state.purged_by} or a later one."
            )
        return state


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

    def held_out(self) -> npt.NDArray[np.bool_]:
        """Which rows are of the validation split: bool [rows]."""
        # The first letters of the strings, since comparing strings would import pyarrow.compute: 170 ms.
        array = self._array("split")
        if not len(array):
            return np.empty(0, np.bool_)
        letters = np.frombuffer(array.buffers()[2], np.uint8)
        return np.asarray(letters[self._rows_of(array, 1, np.dtype(np.int32))] == ord("v"))

    def where(self, mask: npt.NDArray[np.bool_]) -> "ShardList":
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

    def is_at(self, generation: int) -> npt.NDArray[np.bool_]:
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
        return _dump(self._whole())

    def _whole(self) -> Any:
        """A table of these rows alone."""
        return self._table if self._chosen is None else self._table.take(pa.array(self._chosen))


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data folder. DataError if there is none, it is damaged, or of another format or version."""
    file = folder / MANIFEST
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise no_manifest(folder) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from None
    return parse_manifest(content, file)


def no_manifest(folder: Path | str) -> DataError:
    """The error of a folder that is not a data folder."""
    return DataError(
        f"{folder}: no {MANIFEST} there, so it is not a prepared data folder. "
        f"Make one: megacl prepare INPUT... --tokenizer MODEL --out {folder}"
    )


def parse_manifest(content: bytes, file: Path | str) -> Manifest:
    """The manifest in the content of manifest.json; `file` is how errors name it."""
    try:
        return _MANIFEST.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        raise DataError(f"{file}: not valid JSON; it is damaged. Restore it from a copy, or prepare the folder again.")
    where = ".".join(str(part) for part in first["loc"]) or "the whole"
    if where in ("format", "version"):
        raise DataError(
            f"{file}: {where} is {first['input']!r}, but this megacl reads {FORMAT} version {VERSION}. "
            "Prepare the folder again, or use the megacl that wrote it."
        )
    raise DataError(
        f"{file}: {where}: {first['msg'].lower()}; it is damaged. Restore it from a copy, or prepare the folder again."
    )


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
    shards = ShardList(_parse(content, _ROW_SCHEMA, file, "the list of shards"))
    counts = ("documents", "tokens", "text_bytes", "size", "offset", "added", "removed")
    if any((shards.numbers(name) < 0).any() for name in counts):
        raise DataError(f"{file}: the list of shards is damaged: it has a negative count. {_REMEDY}")
    return shards


def read_inputs(folder: Path, generation: int) -> tuple[InputFile, ...]:
    """The raw inputs of generations 1 to `generation`, in order. DataError if inputs.arrow is missing or damaged."""
    table = _parse(_content(folder / INPUTS), _INPUT_SCHEMA, folder / INPUTS, "the list of inputs")
    rows = (InputFile(**{**tree, "sha256": tree["sha256"].hex()}) for tree in table.to_pylist())
    return tuple(row for row in rows if row.generation <= generation)


@dataclasses.dataclass(frozen=True)
class Removed:
    """Documents that were removed on request: the rows of removed.arrow, as columns [N]."""

    hashes: Hashes = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))
    generations: npt.NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))

    def and_also(self, hashes: Hashes, generation: int) -> "Removed":
        """These, and behind them those that are absent from a generation on."""
        numbers = np.full(len(hashes), generation, np.int32)
        return Removed(np.concatenate([self.hashes, hashes]), np.concatenate([self.generations, numbers]))


def read_removed(folder: Path, generations: Sequence[Generation]) -> Removed:
    """The documents that were removed on request up to the last of a folder's generations, which begin with the first.

    DataError if removed.arrow is damaged, or missing though one of them removed documents.
    """
    if not (folder / REMOVED).exists() and all(each.made_by != "remove" for each in generations):
        return Removed()
    table = _parse(_content(folder / REMOVED), _REMOVED_SCHEMA, folder / REMOVED, "the list of removed documents")
    numbers = np.array(table.column("generation").to_pylist(), np.int32)
    kept = numbers <= len(generations)
    return Removed(np.array(table.column("hash").to_pylist(), np.uint64)[kept], numbers[kept])


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from None


def _parse(content: Any, schema: Any, file: Path | str, what: str) -> Any:
    if content is None:
        raise DataError(f"{file}: {what} is missing. {_REMEDY}")
    try:
        table = pa.ipc.open_stream(content).read_all()
    except (pa.ArrowException, OSError):
        table = None
    if table is None or not table.schema.equals(schema):
        raise DataError(f"{file}: {what} is damaged. {_REMEDY}")
    return table


def _dump(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def publish_manifest(
    folder: Path,
    manifest: Manifest,
    shards: ShardList,
    inputs: Sequence[InputFile],
    removed: Removed | None = None,
) -> None:
    """Publishes the lists, then the manifest that counts them: a reader sees the old state or the new.

    shards, inputs, removed: all rows, those of earlier generations first; without a removed document that file is left
    out.
    """
    trees = [{**vars(each), "sha256": bytes.fromhex(each.sha256)} for each in inputs]
    trees = [{name: tree[name] for name in _INPUT_SCHEMA.names} for tree in trees]
    publish_bytes(folder / INPUTS, _dump(pa.Table.from_pylist(trees, schema=_INPUT_SCHEMA)), "the list of inputs")
    if removed is not None and len(removed.hashes):
        table = pa.table([pa.array(removed.hashes), pa.array(removed.generations)], schema=_REMOVED_SCHEMA)
        publish_bytes(folder / REMOVED, _dump(table), "the list of removed documents")
    publish_bytes(folder / SHARDS, shards.dump(), "the list of shards")
    content: Any = _MANIFEST.dump_json(manifest, indent=2)
    publish_text(folder / MANIFEST, str(content, "utf-8") + "\n", "the manifest")
