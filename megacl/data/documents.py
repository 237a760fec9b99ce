"""Raw documents of every form, cut into blocks that workers read on their own.

    reading = Reading(field="content")
    found = find_inputs(["raw/"], reading)
    for block in cut_blocks(found.files, reading):
        for segment in block:
            texts = list(read_segment(segment, reading))

A block is about `block_bytes` of consecutive input, over several files where they are small; how many bytes that is
follows from the size of the inputs, so that small ones keep many workers busy too. How inputs are cut depends on the
inputs, the reading and block_bytes alone. megacl/data/forms says what the forms are and how each is cut.

Memory: a segment is read a few MB at a time. A very long document takes three times its length while it is read, and
six times at most where it has a character beyond U+FFFF, since Python then holds 4 bytes for each (measured: 570 MB
for a JSON line of 200 MB in ASCII, 850 MB with emoji). A compressed file that is being cut holds up to three blocks.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from queue import Full, Queue
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

LEAST_BLOCK_BYTES, BLOCK_BYTES = 2**20, 2**25
"""Bytes of documents in one block, at least and at most; it becomes one shard, and bounds what a worker holds."""
_BLOCKS = 64

Block = tuple[Segment, ...]


class _Form(Protocol):
    """What a module of megacl/data/forms is, see there."""

    def cut(self, file: RawFile, reading: Reading, block_bytes: int) -> Iterator[Segment]: ...

    def read(
        self, segment: Segment, reading: Reading, vocabulary: Vocabulary | None
    ) -> Iterator[tuple[int, Document | BadDocumentError]]: ...

    def place(self, segment: Segment, position: int) -> str: ...


_FORMS: dict[Form, _Form] = {"jsonl": lines, "txt": lines, "parquet": tables, "arrow": tables, "megatron": tokens}


def block_bytes_of(files: Sequence[RawFile]) -> int:
    """How large the blocks of some inputs are to be: there are about 64 of them, or more of the largest size."""
    return min(max(sum(file.size for file in files) // _BLOCKS, LEAST_BLOCK_BYTES), BLOCK_BYTES)


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


def cut_portions_ahead(
    portions: Mapping[int, Sequence[RawFile]], reading: Reading, block_bytes: int, at_once: int
) -> Generator[tuple[int, Block], None, None]:
    """The blocks of each portion's files behind the portion's number, in order, as cut_blocks cuts them.

    at_once: how many portions with compressed files are decompressed at a time, each in a thread (zlib and its like run
    beside one another) and each holding at most three blocks; 0: all is done as it is asked for.
    """
    stopped = threading.Event()
    waiting: deque[tuple[int, Iterator[Block]]] = deque()
    try:
        for number, files in portions.items():
            blocks = cut_blocks(files, reading, block_bytes)
            if at_once and any(file.compression for file in files):
                blocks = _in_thread(blocks, stopped)
            waiting.append((number, blocks))
            if len(waiting) >= at_once:
                first, found = waiting.popleft()
                yield from ((first, block) for block in found)
        for first, found in waiting:
            yield from ((first, block) for block in found)
    finally:
        stopped.set()


def _in_thread(blocks: Iterator[Block], stopped: threading.Event) -> Iterator[Block]:
    """The same blocks, made in a thread that begins now and is one or two ahead, until `stopped` is set."""
    made: Queue[Block | BaseException | None] = Queue(1)

    def hand_over(item: Block | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def work() -> None:
        try:
            if all(map(hand_over, blocks)):
                hand_over(None)
        except BaseException as error:  # raised where the blocks are taken
            hand_over(error)

    def taken() -> Iterator[Block]:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    threading.Thread(target=work, name="cut ahead", daemon=True).start()
    return taken()


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
