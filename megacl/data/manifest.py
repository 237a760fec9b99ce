"""What a data folder holds: manifest.json (small), shards.arrow (a row a shard), inputs.arrow and removed.arrow.

docs/data.md describes them to the byte; data/shard_list.py has the list of shards. Preparing more files or removing
documents makes a generation and leaves the earlier ones as they were. The manifest is published last, so rows of a
generation that it does not count are those of a command that was interrupted; readers never look at them. Only commands
that change a folder read inputs.arrow and removed.arrow.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megacl.data.shard_list import (
    SHARDS,
    STRICT,
    Count,
    DTypeName,
    ShardList,
    Totals,
    dump_table,
    parse_table,
    table_schema,
)
from megacl.errors import DataError
from megacl.publish import publish_bytes, publish_text

FORMAT: Literal["megacl-data"] = "megacl-data"
VERSION: Literal[2] = 2
MANIFEST = "manifest.json"
INPUTS = "inputs.arrow"
REMOVED = "removed.arrow"

MadeBy = Literal["prepare", "remove", "dedup"]
Hashes = npt.NDArray[np.uint64]
"""The first 8 bytes of BLAKE2b (with a digest of 8 bytes) of documents' texts in UTF-8, as big-endian numbers."""

_INPUT_SCHEMA = table_schema(name=pa.string(), size=pa.int64(), sha256=pa.binary(32), generation=pa.int32())
_REMOVED_SCHEMA = table_schema(hash=pa.uint64(), generation=pa.int32())


@dataclass(frozen=True, config=STRICT)
class InputFile:
    """A raw input as it was when it was read: its name as given, its bytes, and their hash."""

    name: str
    size: Count
    sha256: str
    generation: Count = 0  # the generation that it was added by; 0: none yet


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class TokenizerRecord:
    """The tokenizer that all shards of the folder were made with; its file lies in the folder."""

    file: str
    fingerprint: str
    vocab_size: Annotated[int, Field(ge=1)]
    eos_id: Count


@dataclass(frozen=True, config=STRICT)
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


def read_inputs(folder: Path, generation: int) -> tuple[InputFile, ...]:
    """The raw inputs of generations 1 to `generation`, in order. DataError if inputs.arrow is missing or damaged."""
    table = parse_table(_content(folder / INPUTS), _INPUT_SCHEMA, folder / INPUTS, "the list of inputs")
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
    table = parse_table(_content(folder / REMOVED), _REMOVED_SCHEMA, folder / REMOVED, "the list of removed documents")
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
    publish_bytes(folder / INPUTS, dump_table(pa.Table.from_pylist(trees, schema=_INPUT_SCHEMA)), "the list of inputs")
    if removed is not None and len(removed.hashes):
        table = pa.table([pa.array(removed.hashes), pa.array(removed.generations)], schema=_REMOVED_SCHEMA)
        publish_bytes(folder / REMOVED, dump_table(table), "the list of removed documents")
    publish_bytes(folder / SHARDS, shards.dump(), "the list of shards")
    content: Any = _MANIFEST.dump_json(manifest, indent=2)
    publish_text(folder / MANIFEST, str(content, "utf-8") + "\n", "the manifest")
