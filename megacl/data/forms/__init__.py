"""Forms of raw documents, a module each: lines (JSON lines, plain text), tables (Parquet, Arrow), tokens (Megatron).

A form is three functions:

    cut(file, reading, block_bytes)       the file as segments, of about block_bytes of documents each
    read(segment, reading, vocabulary)    (position, document) for each of a segment's documents, in order
    place(segment, position)              how an error names a document: "raw.jsonl:42", "raw.parquet: row 7"

How a file is cut follows from the file, the reading and block_bytes alone. A document is a text, or the ids of its
tokens without an EOS; in the place of one that cannot be read stands a BadDocumentError. Positions are the form's own:
bytes of lines, rows of tables, numbers of documents.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megacl.errors import DataError

Form = Literal["jsonl", "txt", "parquet", "arrow", "megatron"]
Document = str | npt.NDArray[np.integer[Any]]

_LINES: dict[str, Form] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt"}
_BINARY: dict[str, Form] = {".parquet": "parquet", ".arrow": "arrow", ".bin": "megatron", ".idx": "megatron"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")

FORMS_TEXT = ".jsonl, .ndjson, .json or .txt (also with .gz, .zst, .bz2 or .xz), .parquet, .arrow, .bin with .idx"
"""The endings of names that form_of knows, for messages."""


def form_of(name: str) -> tuple[Form, str] | None:
    """The form that a file's name says, and the ending of its compression or ""; None for a file of another kind."""
    stem, compression = name, ""
    for suffix in _COMPRESSED:
        if name.endswith(suffix):
            stem, compression = name.removesuffix(suffix), suffix
    form = _LINES.get(os.path.splitext(stem)[1])
    if form is None and not compression:
        form = _BINARY.get(os.path.splitext(stem)[1])
    return (form, compression) if form else None


@dataclass(frozen=True)
class RawFile:
    """An input as it was found: its name as given, what it is, its size in bytes, and when it last changed (ns).

    It lies at `paths`: one file, but two of Megatron's, whose sizes are added.
    """

    name: str
    form: Form
    compression: str  # the ending, such as ".gz", or ""
    paths: tuple[str, ...]
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Segment:
    """The documents of one file that begin in [start, end), by the form's own positions."""

    file: RawFile
    start: int
    end: int
    size: int  # bytes of documents in it, as far as can be known before they are read: what fills a block
    cost: int  # bytes of the file on disk that it stands for, for progress
    content: bytes | None = None  # the lines themselves, where a file cannot be entered in the middle
    lines_before: int = 0  # with content: how many lines of the file lie before it


class BadDocumentError(ValueError):
    """What stands in a document's place is none; the message says why, and begins what to do."""


class Vocabulary(Protocol):
    """What reading token ids needs to know of the tokenizer that made them."""

    vocab_size: int
    eos_id: int


def measure(paths: tuple[str, ...]) -> tuple[int, int]:
    """The bytes of some files together, and when one of them last changed (ns). OSError if one is not there."""
    facts = [os.stat(path) for path in paths]
    return sum(each.st_size for each in facts), max(each.st_mtime_ns for each in facts)


def check_unchanged(file: RawFile) -> None:
    """DataError if the file is not as it was when it was found, by its size and its time of change."""
    with disk_named(file.name):
        found = measure(file.paths)
    if found != (file.size, file.modified_ns):
        raise DataError(f"{file.name}: the file changed while it was read. Run the same command again.")


@contextlib.contextmanager
def disk_named(name: str) -> Iterator[None]:
    """Turns what the disk refuses while a file is read into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}.") from None
