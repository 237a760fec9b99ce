"""Tables, a row a document: Parquet files, and Arrow IPC files and streams, as datasets.save_to_disk writes them.

Segments are ranges of rows. Of the columns only the one that the text lies in is read. A row group or a record batch
with more text than block_bytes is cut into ranges of as many rows each. A range is reached by decoding what lies before
it in its row group, or in its stream; Parquet's row groups and the record batches of an Arrow file are entered
directly. So that this stays little beside encoding the text, there are at most 8 ranges, or more of 32 MB each.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from megacl.data.forms import BadDocumentError, Document, RawFile, Segment, Vocabulary, check_unchanged
from megacl.data.forms.reading import Reading
from megacl.errors import DataError

_BATCH_BYTES = 2**22
_READ_BYTES = 2**20
_PIECES, _PIECE_BYTES = 8, 2**25
_ARROW_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def cut(file: RawFile, reading: Reading, block_bytes: int) -> Iterator[Segment]:
    """The file as segments, see megacl.data.forms. DataError if it is damaged or has no such column."""
    with _damage_named(file):
        check_unchanged(file)
        with _open(file, reading) as table:
            parts = list(table.parts())
    rows = sum(count for count, _ in parts)
    start = 0
    for count, size in _ranges(parts, block_bytes):
        cost = file.size * (start + count) // rows - file.size * start // rows
        yield Segment(file, start, start + count, size=size, cost=cost)
        start += count


def _ranges(parts: Iterable[tuple[int, int]], block_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows and bytes of each segment, from those of row groups or batches: whole ones together, or one in pieces."""
    held_rows = held_bytes = 0
    for rows, size in parts:
        if held_rows and held_bytes + size > block_bytes:
            yield held_rows, held_bytes
            held_rows = held_bytes = 0
        if size <= block_bytes:
            held_rows, held_bytes = held_rows + rows, held_bytes + size
            continue
        piece_bytes = max(block_bytes, min(-(-size // _PIECES), _PIECE_BYTES))
        pieces = min(rows, -(-size // piece_bytes))
        for piece in range(pieces):
            yield rows * (piece + 1) // pieces - rows * piece // pieces, size // pieces
    if held_rows:
        yield held_rows, held_bytes


def read(
    segment: Segment, reading: Reading, vocabulary: Vocabulary | None
) -> Iterator[tuple[int, Document | BadDocumentError]]:
    """The segment's documents, see megacl.data.forms."""
    with _damage_named(segment.file), _open(segment.file, reading) as table:
        position = segment.start
        for batch in table.batches(segment.start, segment.end):
            for row in _rows(batch):
                document: str | BadDocumentError
                try:
                    document = row if isinstance(row, BadDocumentError) else reading.text_in(row)
                except BadDocumentError as error:
                    document = error
                yield position, document
                position += 1


def place(segment: Segment, position: int) -> str:
    """The file's name and the number, from 1, of the row at a position."""
    return f"{segment.file.name}: row {position + 1}"


def _rows(batch: Any) -> Iterable[dict[str, Any] | BadDocumentError]:
    try:
        found: list[dict[str, Any] | BadDocumentError] = batch.to_pylist()
        return found
    except UnicodeDecodeError:  # strings in Arrow are promised to be UTF-8, and nobody checks
        return map(_row, (batch.slice(index, 1) for index in range(batch.num_rows)))


def _row(batch: Any) -> dict[str, Any] | BadDocumentError:
    try:
        row: dict[str, Any] = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError as error:
        return BadDocumentError(f"the text is not UTF-8 (byte {error.start + 1} of it); mend the row")


@contextmanager
def _damage_named(file: RawFile) -> Iterator[None]:
    """Turns what pyarrow says of a damaged file into a DataError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, _DamagedError) as error:
        check_unchanged(file)  # that would be why
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{file.name}: cannot be read: {error.strerror}.") from None
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DataError(f"{file.name}: not a whole {file.form} file ({reason}). Copy or download it again.") from None


class _DamagedError(Exception):
    """The message says what is wrong with a file that pyarrow takes for a whole one."""


@contextmanager
def _open(file: RawFile, reading: Reading) -> Iterator["_Parquet | _Arrow"]:
    if file.form == "parquet":
        with pa.OSFile(file.paths[0]) as opened:
            yield _Parquet(opened, file, reading)
    else:
        with pa.memory_map(file.paths[0]) as opened:
            yield _Arrow(opened, file, reading)


def _column_of(schema: Any, file: RawFile, field: str) -> str:
    """The column that a field lies in: the one of its name, or of the first part of a path. DataError if none."""
    for name in (field, field.partition(".")[0]):
        if name in schema.names:
            return name
    columns = ", ".join(map(repr, schema.names[:8])) or "none"
    raise DataError(f"{file.name}: no column for field {field!r}, only {columns}; name the one with --field.")


class _Parquet:
    def __init__(self, opened: Any, file: RawFile, reading: Reading) -> None:
        from pyarrow.parquet import ParquetFile  # 20 ms, and most inputs are none

        # Page by page: otherwise the whole of a column in a row group would lie in memory.
        self.file = ParquetFile(opened, buffer_size=_READ_BYTES, pre_buffer=False)
        self.column = _column_of(self.file.schema_arrow, file, reading.field)
        # Of a struct only the child that is asked for; a list's children have names of their own, so all of them.
        paths = [self.file.schema.column(index).path for index in range(len(self.file.schema))]
        leaf = reading.field if reading.field in paths else None
        self.leaves = {index for index, path in enumerate(paths) if path == leaf or (not leaf and self._holds(path))}
        self.columns = [leaf or self.column]

    def _holds(self, path: str) -> bool:
        return path == self.column or path.startswith(f"{self.column}.")

    def parts(self) -> Iterator[tuple[int, int]]:
        """Rows of each row group, and bytes of text in it as the file says: fewer than there are if many are equal."""
        for index in range(self.file.metadata.num_row_groups):
            group = self.file.metadata.row_group(index)
            yield group.num_rows, sum(group.column(leaf).total_uncompressed_size for leaf in self.leaves)

    def batches(self, start: int, end: int) -> Iterator[Any]:
        """Rows [start, end) of the file, of the text's column alone."""
        base = 0
        for index, (rows, size) in enumerate(self.parts()):
            first, last = max(start, base), min(end, base + rows)
            if first < last:
                batch_size = max(1, min(rows, rows * _BATCH_BYTES // max(size, 1)))
                found = self.file.iter_batches(batch_size, row_groups=[index], columns=self.columns, use_threads=False)
                yield from _within(found, base, first, last)
            base += rows


class _Arrow:
    def __init__(self, mapped: Any, file: RawFile, reading: Reading) -> None:
        self.mapped, self.is_file = mapped, mapped.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
        open_ipc = pa.ipc.open_file if self.is_file else pa.ipc.open_stream
        mapped.seek(0)
        schema = open_ipc(mapped).schema
        index = schema.get_field_index(_column_of(schema, file, reading.field))
        mapped.seek(0)
        self.reader = open_ipc(mapped, options=pa.ipc.IpcReadOptions(included_fields=[index], use_threads=False))

    def parts(self) -> Iterator[tuple[int, int]]:
        """Rows of each record batch, and the bytes of the text's column in it."""
        for batch in self._all():
            yield batch.num_rows, batch.nbytes
        if not self.is_file:
            self._check_end()

    def _check_end(self) -> None:
        # pyarrow takes a stream that was cut off between two batches, or has another one behind it, for a whole one.
        end = self.mapped.tell()
        self.mapped.seek(max(0, end - len(_END_OF_STREAM)))
        if self.mapped.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
            raise _DamagedError("it ends without the mark of a stream's end")
        if end != self.mapped.size():
            raise _DamagedError("something follows behind the stream's end")

    def _all(self) -> Iterator[Any]:
        return map(self.reader.get_batch, range(self.reader.num_record_batches)) if self.is_file else iter(self.reader)

    def batches(self, start: int, end: int) -> Iterator[Any]:
        """Rows [start, end) of the file, of the text's column alone."""
        for batch in _within(self._all(), 0, start, end):
            rows = max(1, min(batch.num_rows, batch.num_rows * _BATCH_BYTES // max(batch.nbytes, 1)))
            for first in range(0, batch.num_rows, rows):
                yield batch.slice(first, rows)


def _within(batches: Iterable[Any], base: int, start: int, end: int) -> Iterator[Any]:
    """What of some batches lies in rows [start, end), where the first batch begins at row `base`."""
    for batch in batches:
        first, last = max(start, base), min(end, base + batch.num_rows)
        if first < last:
            yield batch.slice(first - base, last - first)
        base += batch.num_rows
        if base >= end:
            return
