"""Readable paragraphs of documentation: HTML, KDE's handbooks, manual pages and plain text.

    for name, paragraphs in read_pages("usr/share/doc/x/index.html", content): ...

A heading is the first line of the paragraph behind it, so that no heading stands alone.
"""

import bz2
import gzip
import re
import unicodedata
from collections.abc import Iterator

from doctext import html, roff

_KDE_PAGE = re.compile(r'<FILENAME filename="([^"]+)">')
_CHARSET = re.compile(rb"charset=[\"']?([\w-]+)|encoding=\"([\w-]+)")
# Control characters, soft hyphens, zero-width spaces and byte order marks go; a no-break space is a space.
_REPLACED = {**dict.fromkeys([*range(9), *range(11, 32), 0xAD, 0x200B, 0xFEFF]), 0xA0: " "}


def text_paragraphs(raw: str) -> list[str]:
    """What stands between the blank lines of a plain text, each as one line."""
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", raw) if paragraph.strip()]


def decode(content: bytes) -> str:
    """Text by the encoding that it names, UTF-8 if none, and Windows-1252 where it is not of that; in NFC."""
    named = _CHARSET.search(content[:3000])
    try:
        raw = content.decode((named[1] or named[2]).decode() if named else "utf-8")
    except (UnicodeDecodeError, LookupError):
        raw = content.decode("cp1252", "replace")
    return unicodedata.normalize("NFC", raw).translate(_REPLACED)


def read_pages(path: str, content: bytes) -> Iterator[tuple[str, list[str]]]:
    """(page's name, its paragraphs) of a file, whose path says what it is: under /man/ a manual page, .txt, or HTML.

    .gz and .bz2 are decompressed. Only KDE's handbooks have several pages, with names; other names are "".
    """
    if path.endswith(".gz"):
        content = gzip.decompress(content)
    elif path.endswith(".bz2"):
        content = bz2.decompress(content)
    raw = decode(content)
    pages = _KDE_PAGE.split(raw)
    for name, page in zip(["", *pages[1::2]], pages[::2], strict=True):
        parts = (
            part.strip("\n").rstrip()
            for paragraph in _paragraphs(path, page)
            for part in re.split(r"\n\s*\n", paragraph)
        )
        yield name, [part for part in parts if part]


def _paragraphs(path: str, raw: str) -> list[str]:
    if "/man/" in path:
        return roff.paragraphs(raw)
    return text_paragraphs(raw) if path.endswith((".txt", ".txt.gz")) else html.paragraphs(raw)
