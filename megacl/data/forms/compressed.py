"""Decompression as a stream: gzip, Zstandard, bzip2 and xz, of files of one part or of several behind one another.

A file that was cut off is an error wherever the cut lies, but where it falls between two parts: that is a whole file.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

from megacl.data.forms import RawFile, check_unchanged, disk_named
from megacl.errors import DataError

PIECE_BYTES = 2**17
_ZSTD_BYTES = 2**12  # 3 bytes may stand for 128 kB of content, and zstandard knows no limit to what it returns
# Some public collections are compressed with `zstd --long=31`, which needs this much to decompress.
_ZSTD_WINDOW = 2**31

# Each makes a decompressor of one part, which knows decompress, eof and unused_data.
_MAKERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}
_ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError)


def read_pieces(raw: io.BufferedReader, file: RawFile) -> Iterator[bytes]:
    """The content of an opened file in small pieces, decompressed if it is compressed. DataError if that fails."""
    if not file.compression:
        yield from _read(raw, file, PIECE_BYTES)
        return
    part = None
    for read in _read(raw, file, _ZSTD_BYTES if file.compression == ".zst" else PIECE_BYTES):
        piece = read
        while piece:
            if part is None:
                if file.compression in (".gz", ".xz") and not (piece := piece.lstrip(b"\0")):
                    break  # both may be padded with zeros behind a part
                part = _MAKERS[file.compression]()
            try:
                yield from _expand(part, piece, file.compression)
            except _ERRORS as error:
                raise _refusal(file, str(error)) from None
            piece, part = (part.unused_data, None) if part.eof else (b"", part)
    if part is not None:
        raise _refusal(file, "it ends in the middle")


def _read(raw: io.BufferedReader, file: RawFile, size: int) -> Iterator[bytes]:
    with disk_named(file.name):
        while piece := raw.read(size):
            yield piece


def _expand(part: Any, piece: bytes, compression: str) -> Iterator[bytes]:
    """What a decompressor makes of a piece, at most PIECE_BYTES at a time where it knows a limit."""
    if compression == ".zst":
        yield part.decompress(piece)
    elif compression == ".gz":
        while piece and not part.eof:
            yield part.decompress(piece, PIECE_BYTES)
            piece = part.unconsumed_tail
    else:
        yield part.decompress(piece, PIECE_BYTES)
        while not part.eof and not part.needs_input:
            yield part.decompress(b"", PIECE_BYTES)


def _refusal(file: RawFile, reason: str) -> DataError:
    check_unchanged(file)  # that would be why
    return DataError(f"{file.name}: cannot be decompressed ({reason}). Copy or download it again.")
