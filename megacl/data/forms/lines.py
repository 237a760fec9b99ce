"""JSON lines and plain text, also compressed and in any encoding.

A line is what ends at a newline; a line of nothing but ASCII white space is blank. In JSON lines every other line is a
document. A plain text file is one document, all of it; or, as paragraphs, a document is as many lines as stand between
blank lines, without the newline (\\n or \\r\\n) of the last one, and otherwise byte for byte.

Segments of a plain file are ranges of bytes: a line belongs to the one in which it begins, a paragraph to the one in
which the blank line before it begins. Compressed files, and those in an encoding whose newline is no byte of its own
(UTF-16), cannot be entered in the middle: their segments carry the lines, block_bytes at a time, the latter in UTF-8.
A text file that is one document is decompressed by the one who reads it.

A byte order mark of UTF-8 at the beginning of JSON lines is passed over; of plain text it is kept, as every byte is,
unless the encoding is utf-8-sig.
"""

import io
from collections.abc import Iterator

from megacl.data.forms import BadDocumentError, Document, RawFile, Segment, Vocabulary, check_unchanged, disk_named
from megacl.data.forms.compressed import read_pieces
from megacl.data.forms.reading import BOM, Reading
from megacl.errors import DataError

MAX_TEXT_FILE = 2**30
"""Bytes of a text file that is one document: more are taken for a mistake, since all of them lie in memory."""


def cut(file: RawFile, reading: Reading, block_bytes: int) -> Iterator[Segment]:
    """The file as segments, see megacl.data.forms."""
    if _is_one_document(file, reading):
        yield Segment(file, 0, file.size, size=file.size, cost=file.size)
    elif file.compression or not reading.cuts_at_newlines:
        yield from _cut_stream(file, reading, block_bytes)
    else:
        for start in range(0, file.size, block_bytes):
            end = min(start + block_bytes, file.size)
            yield Segment(file, start, end, size=end - start, cost=end - start)


def _is_one_document(file: RawFile, reading: Reading) -> bool:
    return file.form == "txt" and reading.text != "paragraphs"


def _cut_stream(file: RawFile, reading: Reading, block_bytes: int) -> Iterator[Segment]:
    start = lines = spent = 0
    with disk_named(file.name), open(file.paths[0], "rb") as raw:
        check_unchanged(file)
        pieces = read_pieces(raw, file)
        if not reading.cuts_at_newlines:
            pieces = _transcode(pieces, reading)
        for content in _portions(pieces, block_bytes, at_blank_lines=file.form == "txt"):
            check_unchanged(file)  # before these lines go under the key of the content hashed
            end, cost = start + len(content), raw.tell() - spent
            yield Segment(file, start, end, size=end - start, cost=cost, content=content, lines_before=lines)
            start, spent, lines = end, spent + cost, lines + content.count(b"\n")
    if start == 0 and file.compression:
        raise DataError(f"{file.name}: nothing is in it but compression. Leave it out, or look at what wrote it.")


def _transcode(pieces: Iterator[bytes], reading: Reading) -> Iterator[bytes]:
    decoder = reading.transcoder()
    for piece in pieces:
        yield decoder.decode(piece).encode(errors="surrogatepass")
    yield decoder.decode(b"", final=True).encode(errors="surrogatepass")


def _portions(pieces: Iterator[bytes], block_bytes: int, at_blank_lines: bool) -> Iterator[bytes]:
    """The pieces' content in portions that end behind a line, or a blank one: the last within block_bytes, or the next.

    The last portion ends where the content does.
    """
    held = bytearray()
    searched = 0  # no portion can end in held[:searched]
    for piece in pieces:
        held += piece
        while len(held) >= block_bytes:
            end = _last_end(held, block_bytes, at_blank_lines) if searched < block_bytes else 0
            end = end or _next_end(held, max(block_bytes, searched), at_blank_lines)
            if not end:
                searched = len(held)
                break
            yield bytes(held[:end])
            del held[:end]
            searched = 0
    if held:
        yield bytes(held)


def _last_end(held: bytearray, limit: int, at_blank_lines: bool) -> int:
    """The last position up to `limit` at which a portion can end; 0 if there is none."""
    end = held.rfind(b"\n", 0, limit) + 1
    while end and at_blank_lines and not _ends_blank_line(held, end):
        end = held.rfind(b"\n", 0, end - 1) + 1
    return end


def _next_end(held: bytearray, start: int, at_blank_lines: bool) -> int:
    """The first position behind `start` at which a portion can end; 0 if there is none."""
    end = held.find(b"\n", start) + 1
    while end and at_blank_lines and not _ends_blank_line(held, end):
        end = held.find(b"\n", end) + 1
    return end


def _ends_blank_line(held: bytearray, end: int) -> bool:
    return held[held.rfind(b"\n", 0, end - 1) + 1 : end].isspace()


def read(
    segment: Segment, reading: Reading, vocabulary: Vocabulary | None
) -> Iterator[tuple[int, Document | BadDocumentError]]:
    """The segment's documents, see megacl.data.forms."""
    is_text = segment.file.form == "txt"
    without_bom = not is_text or reading.encoding == "utf-8-sig"
    if _is_one_document(segment.file, reading):
        found = iter([(0, _whole(segment.file, without_bom))])
    elif is_text:
        found = _paragraphs(segment, without_bom)
    else:
        lines = _lines(segment, beyond_end=False, without_bom=without_bom)
        found = ((position, line) for position, line in lines if line and not line.isspace())
    decode = reading.text_of if is_text else reading.text_of_line
    is_utf8 = segment.content is not None and not reading.cuts_at_newlines
    for position, content in found:
        try:
            document: str | BadDocumentError = decode(content, is_utf8=is_utf8)
        except BadDocumentError as error:
            document = error
        yield position, document


def place(segment: Segment, position: int) -> str:
    """The file's name and the number, from 1, of the line that begins at a position; it may be slow."""
    if segment.content is not None:
        line = segment.lines_before + segment.content.count(b"\n", 0, position - segment.start) + 1
        return f"{segment.file.name}:{line}"
    count = 0
    with open(segment.file.paths[0], "rb") as file:
        while position > 0 and (piece := file.read(min(position, 2**20))):
            count, position = count + piece.count(b"\n"), position - len(piece)
    return f"{segment.file.name}:{count + 1}"


def _whole(file: RawFile, without_bom: bool) -> bytes:
    content = bytearray()
    with open(file.paths[0], "rb") as raw:
        for piece in read_pieces(raw, file):
            content += piece
            if len(content) > MAX_TEXT_FILE:
                raise DataError(
                    f"{file.name}: a text file is one document, and this one is longer than {MAX_TEXT_FILE:,} bytes. "
                    "Give --text paragraphs to cut it at blank lines, or split it."
                )
    return bytes(content).removeprefix(BOM) if without_bom else bytes(content)


def _paragraphs(segment: Segment, without_bom: bool) -> Iterator[tuple[int, bytes]]:
    """The paragraphs behind a blank line that begins in the segment, each with its position."""
    # What a segment carries begins with a paragraph, as a file does.
    inside = segment.start == 0 or segment.content is not None
    begin = 0
    paragraph: list[bytes] = []
    for position, line in _lines(segment, beyond_end=True, without_bom=without_bom):
        if not line.isspace() and inside:
            begin = begin if paragraph else position
            paragraph.append(line)
        elif line.isspace():
            if paragraph:
                yield begin, _join(paragraph)
            paragraph, inside = [], position < segment.end
        if not inside and position >= segment.end:
            return
    if any(paragraph):
        yield begin, _join(paragraph)


def _join(lines: list[bytes]) -> bytes:
    content = b"".join(lines)
    return content.removesuffix(b"\r\n") if content.endswith(b"\r\n") else content.removesuffix(b"\n")


def _lines(segment: Segment, beyond_end: bool, without_bom: bool) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in the segment, or from there to the end of the file, each with its position."""
    position = segment.start
    with io.BytesIO(segment.content) if segment.content is not None else open(segment.file.paths[0], "rb") as file:
        if segment.content is None and position > 0:  # the line that holds the byte before began in an earlier segment
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while (beyond_end or position < segment.end) and (line := file.readline()):
            length = len(line)
            if position == 0 and without_bom:
                line = line.removeprefix(BOM)
            yield position, line
            position += length
