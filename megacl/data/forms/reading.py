"""How raw documents become text: which field of an object, which encoding of bytes, which normalisation.

    reading = Reading(field="meta.text", encoding="latin-1", normalize="nfc")

What is not asked for is not done: newlines and characters stay as they are, byte for byte.
"""

import codecs
import difflib
import encodings.aliases
import json
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from megacl.data.forms import BadDocumentError
from megacl.errors import ConfigError

BOM = codecs.BOM_UTF8

_ASCII = bytes(range(128)).decode("ascii")


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udc80", error.end  # half of a surrogate pair, which no encoding gives


codecs.register_error("megacl-mark", _mark)


@dataclass(frozen=True)
class Reading:
    """What turns raw documents into text. ConfigError for an encoding that Python does not know.

    field: the key of a JSON object or the column of a table that holds the text; where there is no such key, a path of
    keys and of positions in lists, `meta.pages.0.text`. encoding: of JSON lines and plain text; tables have their own.
    normalize: Unicode's normal form that texts are brought into. text: whether a plain text file is one document, or
    documents lie between blank lines; None is the first, and standard input is then JSON lines. control: whether names
    of control tokens in a text, such as <|im_start|>, become those tokens (EOS never does).
    """

    field: str = "text"
    encoding: str = "utf-8"
    normalize: Literal["none", "nfc", "nfkc"] = "none"
    text: Literal["document", "paragraphs"] | None = None
    control: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoding", _canonical(self.encoding))

    @property
    def settings(self) -> dict[str, str | int | float | bool]:
        """What a manifest records of it; `text` and `control` only if they were given."""
        found = {"field": self.field, "encoding": self.encoding, "normalize": self.normalize}
        return {**found, **({"text": self.text} if self.text else {}), **({"control": True} if self.control else {})}

    @property
    def cuts_at_newlines(self) -> bool:
        """Whether every byte 0x0A ends a line and ASCII is ASCII, so that a file can be cut at any of them.

        That is so in UTF-8 and in all encodings of a byte a character that contain ASCII.
        """
        if self.encoding in ("utf-8", "utf-8-sig", "ascii"):
            return True
        try:
            decoded = bytes(range(256)).decode(self.encoding, "replace")
        except UnicodeError:
            return False
        # ISO-2022-JP has none of the upper bytes: there a byte's meaning depends on those before it.
        some_defined = decoded[128:] != "\ufffd" * 128
        return len(decoded) == 256 and decoded[:128] == _ASCII and some_defined

    def transcoder(self) -> codecs.IncrementalDecoder:
        """A decoder that puts a mark where bytes are wrong: encoded with "surrogatepass", it is no UTF-8."""
        return codecs.getincrementaldecoder(self.encoding)("megacl-mark")

    def text_of(self, content: bytes, *, is_utf8: bool = False) -> str:
        """A plain text document. BadDocumentError for bytes that are not of the encoding (or of UTF-8)."""
        return self.finish(_decode(content, self._codec(is_utf8), self.encoding, "the text"))

    def _codec(self, is_utf8: bool) -> str:
        # A byte order mark stands before a file's first document only, so who reads the file takes it away.
        return "utf-8" if is_utf8 or self.encoding == "utf-8-sig" else self.encoding

    def text_of_line(self, line: bytes, *, is_utf8: bool = False) -> str:
        """The text in a JSON object. BadDocumentError if there is none, or the bytes are not of the encoding."""
        encoding = self._codec(is_utf8)
        try:
            # Three times as fast as `json`, and without a second copy of a long line; what it refuses, `json` decides.
            document = from_json(line if encoding == "utf-8" else line.decode(encoding), cache_strings="keys")
        except ValueError:
            text = self.text_in(_parse(_decode(line.rstrip(b"\r\n"), encoding, self.encoding, "the line")))
            _check_pairs(text, self.field)
            return text
        return self.text_in(document)

    def text_in(self, document: Any) -> str:
        """The text in an object, or in a row of a table, where it may be UTF-8 bytes. BadDocumentError if none."""
        if not isinstance(document, dict):
            raise BadDocumentError(f"the line is not a JSON object with a field {self.field!r}; mend or delete it")
        text = _pick(document, self.field)
        if isinstance(text, bytes):
            return self.finish(_decode(text, "utf-8", "utf-8", f"field {self.field!r}"))
        if not isinstance(text, str):
            found = "null" if text is None else type(text).__name__
            raise BadDocumentError(f"field {self.field!r} is not a string but {found}; name another field with --field")
        return self.finish(text)

    def finish(self, text: str) -> str:
        """The text in the normal form that is asked for."""
        if self.normalize == "none":
            return text
        return unicodedata.normalize("NFC" if self.normalize == "nfc" else "NFKC", text)


def _canonical(name: str) -> str:
    """Python's own name of an encoding, one for all its spellings."""
    try:
        "".encode(name)  # refuses what is no encoding of text, such as hex
        codecs.getincrementaldecoder(name)
    except (LookupError, UnicodeError, ValueError):
        known = {*encodings.aliases.aliases, *encodings.aliases.aliases.values()}
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, 1)
        hint = f"did you mean {near[0].replace('_', '-')}? " if near else ""
        raise ConfigError(
            f"encoding is {name!r}, which Python does not know; {hint}Give one such as utf-8, utf-16, latin-1, cp1252."
        ) from None
    return codecs.lookup(name).name


def _decode(content: bytes, encoding: str, declared: str, what: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == declared or declared == "utf-8-sig":
            where = f"byte {error.start + 1} of it is 0x{content[error.start]:02x}"
        else:  # what was decoded before carries marks
            where = f"behind {len(content[: error.start].decode(encoding))} characters of it"
        name = declared.upper()
    raise BadDocumentError(f"{what} is not {name} ({where}); name the file's encoding with --encoding")


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        if line.lstrip().startswith("["):
            raise BadDocumentError(
                "the line begins a JSON array, and documents are JSON objects, one a line; jq -c '.[]' takes it apart"
            ) from None
        raise BadDocumentError(
            f"the line is not JSON ({error.msg.removesuffix(' at')} at character {error.colno}); mend or delete it"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets nested thousands deep
        raise BadDocumentError("the line is JSON that cannot be parsed; mend or delete the line") from None


def _check_pairs(text: str, field: str) -> None:
    """BadDocumentError for half a surrogate pair, which `json` lets pass and no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocumentError(
            f"field {field!r} holds \\u{ord(text[error.start]):04x}, half of a surrogate pair; mend the line"
        ) from None


def _pick(document: Any, path: str) -> Any:
    """What lies under a key or, where there is no such key, under a path of keys and positions in lists."""
    here, rest = document, path
    while True:
        if isinstance(here, dict) and rest in here:
            return here[rest]
        head, dot, tail = rest.partition(".")
        if dot and isinstance(here, dict) and head in here:
            here, rest = here[head], tail
        elif isinstance(here, list) and head.isdecimal() and int(head) < len(here):
            here, rest = here[int(head)], tail
            if not dot:
                return here
        else:
            present = ", ".join(map(repr, list(document)[:5])) or "no field"
            raise BadDocumentError(f"no field {path!r}, only {present}; name the one that holds the text with --field")
