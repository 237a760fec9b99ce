"""Raw documents: JSON lines, plain or compressed with gzip or zstd, cut into blocks that workers read on their own.

An input is a .jsonl, .jsonl.gz or .jsonl.zst file, or a folder that is searched for these, links followed, in the
order of their names. A line is one document: a JSON object with the text in one field; blank lines are passed over. A
block is about `block_bytes` of consecutive input, over several files where they are small. Of a plain file a block
carries byte positions only, and a line belongs to the block in which it begins; a compressed file cannot be entered in
the middle, so its blocks carry the decompressed lines. How inputs are cut depends on the inputs and block_bytes alone.

A file is known by the SHA-256 of its whole content, taken before it is cut; a file that changes between that and the
end of its reading, by its size or its time of change, is refused, so that no hash stands for other lines than it saw.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import stat
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import zstandard

from megacl.data.manifest import InputFile
from megacl.errors import DataError

BLOCK_BYTES = 32 * 2**20
"""Bytes of JSON lines in one block; it becomes one shard, and bounds what a worker holds in memory."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

_READ_BYTES = 2**17
_HASH_BYTES = 2**20
# Some public collections are compressed with `zstd --long=31`, which needs this much to decompress.
_ZSTD_WINDOW = 2**31


@dataclass(frozen=True)
class RawFile:
    """An input on disk as it was found: its name as given, its size in bytes, and when it last changed (ns)."""

    name: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Segment:
    """The lines of one file that begin in [start, end); of a compressed file these are positions in its content."""

    file: RawFile
    start: int
    end: int
    cost: int  # bytes of the file on disk that it stands for, for progress
    content: bytes | None = None  # the lines themselves, of a compressed file
    lines_before: int = 0  # with content: how many lines of the file lie before it

    def line_number(self, position: int) -> int:
        """The number, from 1, of the line that begins at `position` of the file; for an error, so it may be slow."""
        if self.content is not None:
            return self.lines_before + self.content.count(b"\n", 0, position - self.start) + 1
        count = 0
        with open(self.file.name, "rb") as file:
            while position > 0 and (piece := file.read(min(position, 2**20))):
                count, position = count + piece.count(b"\n"), position - len(piece)
        return count + 1


Block = tuple[Segment, ...]


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a command name: the files to read, in order, and those of other kinds in their folders."""

    files: tuple[RawFile, ...]
    passed_over: tuple[str, ...]


def find_inputs(inputs: Sequence[str]) -> Inputs:
    """The files that the inputs name, links and folders behind links included.

    DataError: one is missing, empty, unreadable, or of an unknown form; a folder has a link to nothing in it, or a
    folder that cannot be read.
    """
    names: list[str] = []
    passed_over: list[str] = []
    for name in inputs:
        if stat.S_ISDIR(_stat(name).st_mode):
            found, others = _search(name)
            if not found:
                raise DataError(f"{name}: the folder holds no file that ends with {', '.join(SUFFIXES)}.")
            names += found
            passed_over += others
        elif not name.endswith(SUFFIXES):
            raise DataError(
                f"{name}: not a form that can be read; a file of documents ends with {', '.join(SUFFIXES)}: "
                'one JSON object a line, such as {"text": "..."}.'
            )
        else:
            names.append(name)
    return Inputs(tuple(map(_describe, names)), tuple(map(_printable, passed_over)))


def _search(folder: str) -> tuple[list[str], list[str]]:
    """The files of documents in a folder and in those below it, in the order of their names, and the other files."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}. Mend it, or move it away.")

    found: list[str] = []
    others: list[str] = []
    visited: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        facts = _stat(place)
        if (facts.st_dev, facts.st_ino) in visited:  # a link leads here once more, perhaps in a circle
            folders.clear()
            continue
        visited.add((facts.st_dev, facts.st_ino))
        folders.sort()
        for name in (os.path.join(place, each) for each in names):
            _stat(name)
            (found if name.endswith(SUFFIXES) else others).append(name)
    return sorted(found), sorted(others)


def _stat(name: str) -> os.stat_result:
    try:
        return os.stat(name)
    except OSError as error:
        if os.path.islink(name):
            raise DataError(f"{name}: a link that leads nowhere ({error.strerror}). Mend or remove the link.") from None
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{name}: no such file or folder. Check the name.") from None
        raise DataError(f"{name}: cannot be read: {error.strerror}.") from None


def _printable(name: str) -> str:
    """The name, with bytes of it that are not UTF-8 as \\xNN: neither JSON nor a terminal has a form for those."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _describe(name: str) -> RawFile:
    if _printable(name) != name:
        raise DataError(f"{_printable(name)}: the file's name is not UTF-8, so it cannot be recorded. Rename the file.")
    if not stat.S_ISREG(_stat(name).st_mode):
        raise DataError(f"{name}: not a file but a pipe or a device. Write its content to a file and give that.")
    with _named(name), open(name, "rb") as file:
        facts = os.fstat(file.fileno())
    if facts.st_size == 0:
        raise DataError(f"{name}: the file is empty. Leave it out, or look at what should have written it.")
    return RawFile(name, facts.st_size, facts.st_mtime_ns)


def identify(files: Sequence[RawFile], threads: int) -> tuple[InputFile, ...]:
    """What a manifest records of the files, in order: it reads all of them, as many at once as there are threads.

    DataError: a file has the content of another one, changed since it was found, or cannot be read.
    """
    stopped = threading.Event()

    def describe(file: RawFile) -> InputFile:
        digest = hashlib.sha256()
        with _named(file.name), open(file.name, "rb", buffering=0) as raw:
            while not stopped.is_set() and (piece := raw.read(_HASH_BYTES)):
                digest.update(piece)
            _check_unchanged(file, os.stat(file.name))
        return InputFile(name=file.name, size=file.size, sha256=digest.hexdigest())

    with ThreadPoolExecutor(threads) as pool:
        try:
            records = tuple(pool.map(describe, files))
        finally:
            stopped.set()  # the pool waits for what its threads have begun; not for long after an error or Ctrl-C
    refuse_twice(records)
    return records


def refuse_twice(files: Sequence[InputFile]) -> None:
    """DataError if two of the files have one content."""
    first_of: dict[str, InputFile] = {}
    for file in files:
        if (first := first_of.setdefault(file.sha256, file)) is not file:
            raise DataError(f"{file.name}: its content is given twice, the first time as {first.name}. Leave one out.")


def _check_unchanged(file: RawFile, facts: os.stat_result) -> None:
    if (facts.st_size, facts.st_mtime_ns) != (file.size, file.modified_ns):
        raise DataError(f"{file.name}: the file changed while it was read. Run the same command again.")


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns what the disk refuses while a file is read into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}.") from None


def cut_blocks(files: Sequence[RawFile], block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The inputs as blocks, in order; compressed files are decompressed as they are reached, a block at a time."""
    block: list[Segment] = []
    for file in files:
        for segment in _cut_plain(file, block_bytes) if _is_plain(file) else _cut_compressed(file, block_bytes):
            if block and sum(each.end - each.start for each in block) + segment.end - segment.start > block_bytes:
                yield tuple(block)
                block = []
            block.append(segment)
    if block:
        yield tuple(block)


def _is_plain(file: RawFile) -> bool:
    return file.name.endswith(".jsonl")


def _cut_plain(file: RawFile, block_bytes: int) -> Iterator[Segment]:
    for start in range(0, file.size, block_bytes):
        end = min(start + block_bytes, file.size)
        yield Segment(file, start, end, cost=end - start)


def _cut_compressed(file: RawFile, block_bytes: int) -> Iterator[Segment]:
    start = lines = spent = 0
    with _named(file.name), open(file.name, "rb") as raw:
        _check_unchanged(file, os.fstat(raw.fileno()))
        for content in _whole_lines(_decompress(raw, file), block_bytes):
            _check_unchanged(file, os.stat(file.name))  # before these lines go under the key of the content hashed
            end, cost = start + len(content), raw.tell() - spent
            yield Segment(file, start, end, cost, content, lines)
            start, spent, lines = end, spent + cost, lines + content.count(b"\n")
    if start == 0:
        raise DataError(f"{file.name}: nothing is in it but compression. Leave it out, or look at what wrote it.")


def _whole_lines(pieces: Iterator[bytes], block_bytes: int) -> Iterator[bytes]:
    """The pieces' content in portions that end at a newline: the last one that lies within block_bytes, or the next."""
    held = bytearray()
    searched = 0  # no newline lies in held[block_bytes:searched]
    for piece in pieces:
        held += piece
        while len(held) >= block_bytes:
            cut = held.rfind(b"\n", 0, block_bytes) + 1 or held.find(b"\n", max(block_bytes, searched)) + 1
            if not cut:
                searched = len(held)
                break
            yield bytes(held[:cut])
            del held[:cut]
            searched = 0
    if held:
        yield bytes(held)


def _decompress(raw: io.BufferedReader, file: RawFile) -> Iterator[bytes]:
    try:
        yield from _gunzip(raw) if file.name.endswith(".gz") else _unzstd(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        _check_unchanged(file, os.stat(file.name))  # that would be why
        reason = "it ends in the middle" if isinstance(error, EOFError) else str(error)
        raise DataError(f"{file.name}: cannot be decompressed ({reason}). Copy or download it again.") from None


def _gunzip(raw: io.BufferedReader) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as file:
        while piece := file.read(_READ_BYTES):
            yield piece


def _unzstd(raw: io.BufferedReader) -> Iterator[bytes]:
    # Frame by frame: zstandard's stream reader takes a file that was cut off for one that ended.
    frame = None
    while piece := raw.read(_READ_BYTES):
        while piece:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
            if content := frame.decompress(piece):
                yield content
            piece = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError


def read_segment(segment: Segment, field: str, skip_bad: bool = False) -> Iterator[str | None]:
    """The texts of a segment's lines, which may be empty; None for a line that holds no document, with skip_bad.

    Without skip_bad such a line is a DataError that names file and line: it is not UTF-8 or not a JSON object, the
    field is missing or no string, or its text holds half a surrogate pair, which no UTF-8 has. DataError also if the
    file is no longer the one that the segment was cut from.
    """
    name = segment.file.name
    with _named(name):
        for position, line in _lines(segment):
            if line.isspace():
                continue
            try:
                text = _text(line, field)
            except _BadLineError as error:
                if not skip_bad:
                    number = segment.line_number(position)
                    raise DataError(f"{name}:{number}: {error}, or leave bad lines out with --skip-bad.") from None
                text = None
            yield text
        if segment.content is None:
            _check_unchanged(segment.file, os.stat(name))


def read_documents(inputs: Sequence[str], field: str = "text") -> Iterator[str]:
    """The text of every document of the inputs, in order. DataError as for find_inputs, identify and read_segment."""
    files = find_inputs(inputs).files
    identify(files, threads=1)  # refuses what is given twice
    for block in cut_blocks(files):
        for segment in block:
            yield from filter(None, read_segment(segment, field))


def _lines(segment: Segment) -> Iterator[tuple[int, bytes]]:
    """The segment's lines, each with its position in the file."""
    position = segment.start
    if segment.content is not None:
        for line in io.BytesIO(segment.content):
            yield position, line
            position += len(line)
        return
    with open(segment.file.name, "rb") as file:
        if position > 0:  # the line that holds the byte before began in an earlier segment
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < segment.end and (line := file.readline()):
            yield position, line
            position += len(line)


class _BadLineError(ValueError):
    """A line that holds no document; the message says why, and begins what to do."""


def _text(line: bytes, field: str) -> str:
    try:
        document = json.loads(line.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise _BadLineError(
            f"the line is not UTF-8 (byte {error.start + 1} of it is 0x{line[error.start]:02x}); "
            "convert the file with iconv"
        ) from None
    except json.JSONDecodeError as error:
        raise _BadLineError(
            f"the line is not JSON ({error.msg.removesuffix(' at')} at character {error.colno}); mend or delete it"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets nested thousands deep
        raise _BadLineError("the line is JSON that cannot be parsed; mend or delete the line") from None
    if not isinstance(document, dict):
        raise _BadLineError(f"the line is not a JSON object with a field {field!r}; mend or delete the line")
    if field not in document:
        present = ", ".join(map(repr, list(document)[:5])) or "no field"
        raise _BadLineError(f"no field {field!r}, only {present}; name the one that holds the text with --field")
    text = document[field]
    if not isinstance(text, str):
        raise _BadLineError(
            f"field {field!r} is not a string but {type(text).__name__}; name another field with --field"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _BadLineError(
                f"field {field!r} holds \\u{ord(text[error.start]):04x}, half of a surrogate pair; mend the line"
            ) from None
    return text
