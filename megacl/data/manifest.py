"""What a data folder holds: manifest.json (small) and shards.arrow (a row a shard).

docs/formats.md describes both to the byte. In short: shards.arrow lists the shards and only ever grows; a generation
is its first N rows, so preparing more files appends a generation and leaves the earlier ones as they were. The
manifest is published after the list of shards, so rows that no generation counts are those of a run that was
interrupted; readers never look at them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megacl.errors import DataError
from megacl.publish import publish_bytes, publish_text

FORMAT: Literal["megacl-data"] = "megacl-data"
VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
SHARDS = "shards.arrow"

Split = Literal["train", "validation"]
DTypeName = Literal["uint16", "uint32"]
Count = Annotated[int, Field(ge=0)]

_STRICT = ConfigDict(extra="forbid")

_ROW_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("documents", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("text_bytes", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


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


@dataclass(frozen=True, config=_STRICT)
class Generation:
    """One state of the folder: its first `shards` shards. All counts are over the whole state."""

    generation: Annotated[int, Field(ge=1)]
    shards: Annotated[int, Field(ge=1)]
    train: Totals
    validation: Totals
    fingerprint: str
    inputs: tuple[InputFile, ...]  # what this generation added
    field: str  # the JSON field that its text came from
    bad_lines: Count  # lines that were left out of what it added
    empty_documents: Count  # documents without text that were left out of what it added


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
    version: Literal[1]
    source: str
    dtype: DTypeName
    tokenizer: TokenizerRecord
    validation: Annotated[float, Field(ge=0, lt=1)]  # the part of the documents that is held out
    generations: Annotated[tuple[Generation, ...], Field(min_length=1)]

    def at(self, generation: int | None, folder: Path) -> Generation:
        """A generation, the last one if None; DataError if the folder has no such generation."""
        if generation is None:
            return self.generations[-1]
        if not 1 <= generation <= len(self.generations):
            raise DataError(
                f"{folder / MANIFEST}: generation {generation} is asked for, but the folder has 1 to "
                f"{len(self.generations)}. Name one of these, or prepare the missing files into it."
            )
        return self.generations[generation - 1]


_MANIFEST = TypeAdapter(Manifest)
_ROWS = TypeAdapter(tuple[ShardRow, ...])


def fingerprint_of(tokenizer: str, dtype: str, rows: Sequence[ShardRow]) -> str:
    """Hexadecimal SHA-256 over what a token stream is made of.

    tokenizer: the tokenizer's fingerprint; dtype: "uint16" or "uint32"; rows: the shards, in order. Names of files
    and the inputs' names have no part in it, so the same text prepared in two places has one fingerprint.
    """
    lines = [tokenizer, dtype, *(f"{row.split} {row.documents} {row.tokens} {row.sha256}" for row in rows)]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def totals_of(rows: Sequence[ShardRow], split: Split) -> Totals:
    """Sums over the rows of one split."""
    chosen = [row for row in rows if row.split == split]
    return Totals(
        documents=sum(row.documents for row in chosen),
        tokens=sum(row.tokens for row in chosen),
        text_bytes=sum(row.text_bytes for row in chosen),
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data folder. DataError if there is none, it is damaged, or of another format or version."""
    file = folder / MANIFEST
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder}: no {MANIFEST} there, so it is not a prepared data folder. "
            f"Make one: megacl prepare INPUT... --tokenizer MODEL --out {folder}"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from None
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


def read_rows(folder: Path, count: int) -> tuple[ShardRow, ...]:
    """The first `count` rows of shards.arrow. DataError if it is missing, damaged, or shorter."""
    file = folder / SHARDS
    remedy = "Restore it from a copy, or prepare the folder again."
    try:
        with pa.OSFile(str(file)) as opened, pa.ipc.open_stream(opened) as stream:
            rows = _ROWS.validate_python(stream.read_all().slice(0, count).to_pylist())
    except FileNotFoundError:
        raise DataError(f"{file}: the list of shards is missing. {remedy}") from None
    except (pa.ArrowException, OSError, ValidationError):
        raise DataError(f"{file}: the list of shards is damaged. {remedy}") from None
    if len(rows) < count:
        raise DataError(f"{file}: it lists {len(rows)} shards, but {MANIFEST} counts {count}. {remedy}")
    return rows


def publish_manifest(folder: Path, manifest: Manifest, rows: Sequence[ShardRow]) -> None:
    """Publishes the list of shards, then the manifest that counts them: a reader sees the old state or the new."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _ROW_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(_ROWS.dump_python(tuple(rows)), schema=_ROW_SCHEMA))
    publish_bytes(folder / SHARDS, sink.getvalue(), "the list of shards")
    publish_text(folder / MANIFEST, _json(manifest), "the manifest")


def _json(manifest: Manifest) -> str:
    content: Any = _MANIFEST.dump_json(manifest, indent=2)
    return str(content, "utf-8") + "\n"
