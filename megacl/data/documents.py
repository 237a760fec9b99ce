"""Raw documents of every form, cut into blocks that workers read on their own.

    reading = Reading(field="content")
    found = find_inputs(["raw/"], reading)
    for block in cut_blocks(found.files, reading):
        for segment in block:
            texts = list(read_segment(segment, reading))

A block is about `block_bytes` of consecutive input, over several files where they are small. How inputs are cut depends
on the inputs, the reading and block_bytes alone. megacl/data/forms says what the forms are and how each is cut.

Memory: a segment is read a few MB at a time, and a document takes up to its length in the file and that of its text as
Python holds it: 4 bytes a character where one of them lies beyond U+FFFF.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from megacl.data.forms import (
    BadDocumentError,
    Document,
    Form,
    RawFile,
    Segment,
    Vocabulary,
    check_unchanged,
    disk_named,
    lines,
    tables,
    tokens,
)
from megacl.data.forms.reading import Reading
from megacl.data.inputs import STANDARD_INPUT, find_inputs, identify
from megacl.errors import DataError

BLOCK_BYTES = 32 * 2**20
"""Bytes of documents in one block; it becomes one shard, and bounds what a worker holds in memory."""

Block = tuple[Segment, ...]


class _Form(Protocol):
    """What a module of megacl/data/forms is, see there."""

    def cut(self, file: RawFile, reading: Reading, block_bytes: int) -> Iterator[Segment]: ...

    def read(
        self, segment: Segment, reading: Reading, vocabulary: Vocabulary | None
    ) -> Iterator[tuple[int, Document | BadDocumentError]]: ...

    def place(self, segment: Segment, position: int) -> str: ...


_FORMS: dict[Form, _Form] = {"jsonl": lines, "txt": lines, "parquet": tables, "arrow": tables, "megatron": tokens}


def cut_blocks(files: Sequence[RawFile], reading: Reading, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The inputs as blocks, in order; compressed files are decompressed as they are reached, a block at a time.

    DataError: a file is damaged, changed since it was found, or has no such column.
    """
    block: list[Segment] = []
    size = 0
    for file in files:
        for segment in _FORMS[file.form].cut(file, reading, block_bytes):
            if block and size + segment.size > block_bytes:
                yield tuple(block)
                block, size = [], 0
            block.append(segment)
            size += segment.size
    if block:
        yield tuple(block)


def read_segment(
    segment: Segment, reading: Reading, skip_bad: bool = False, vocabulary: Vocabulary | None = None
) -> Iterator[Document | None]:
    """The segment's documents: texts, which may be empty, or token ids without EOS; None for a bad one, with skip_bad.

    vocabulary: the tokenizer's, which token ids need. Without skip_bad a bad document is a DataError that names its
    file and place: bytes that are not of the encoding, a line that is no JSON object, a field that is missing or no
    string, half a surrogate pair, which no UTF-8 has. DataError also if the file is no longer the one that the segment
    was cut from, or if ids lie beyond the vocabulary.
    """
    form = _FORMS[segment.file.form]
    with disk_named(segment.file.name):
        for position, document in form.read(segment, reading, vocabulary):
            if not isinstance(document, BadDocumentError):
                yield document
            elif skip_bad:
                yield None
            else:
                place = form.place(segment, position)
                raise DataError(f"{place}: {document}, or leave bad documents out with --skip-bad.")
        if segment.content is None:
            check_unchanged(segment.file)


def read_documents(inputs: Sequence[str], reading: Reading | None = None) -> Iterator[str]:
    """The text of every document of the inputs, in order, by default of the field "text".

    DataError as for find_inputs, identify and read_segment; for standard input and for token ids.
    """
    reading = reading or Reading()
    if STANDARD_INPUT in inputs:
        raise DataError(f"{STANDARD_INPUT}: standard input can be prepared, but not read here. Give a file.")
    files = find_inputs(inputs, reading).files
    identify(files, threads=1)  # refuses what is given twice
    for block in cut_blocks(files, reading):
        for segment in block:
            for document in read_segment(segment, reading):
                assert isinstance(document, str)
                if document:
                    yield document
