"""Where a text may be cut so that its parts, encoded alone, give the ids of the whole.

    boundaries = of_sentencepiece(model)      # or of_hugging_face(tree); None: nowhere, as far as can be told
    boundaries[x << 8 | y]                    # bool [65536]: whether the text may be cut between the bytes x and y

Both answers follow from the tokenizer's file alone, and where one of its parts is not known here, the answer is None.

**BPE of SentencePiece** joins neighbours to ever longer pieces, and whatever it joins on the way is itself a piece. So
nothing ever joins two neighbours that stand side by side in no piece: which digit follows which, for one, where digits
are split. This needs a normaliser that leaves text alone, or two neighbours become one before they are joined. It does
not hold for unigram models: they add up the scores of a whole text in 32 bits, so that how far a word stands from the
beginning can decide, by rounding, between two ways to split it.

**The patterns of Hugging Face files** below split a text into words before anything is joined. In each of them a match
that reached a byte of WORD_END ends before a byte of AFTER_WORD, wherever it began, and none looks back.
"""

import struct
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Boundaries = npt.NDArray[np.bool_]

_CONTINUATION = (np.arange(256) & 0xC0) == 0x80
"""Bytes that no UTF-8 character begins with."""


def _pairs(texts: Iterable[bytes]) -> npt.NDArray[np.bool_]:
    """bool [256, 256]: which bytes stand side by side in one of the texts."""
    known = [text for text in texts if text]
    values = np.frombuffer(b"".join(known), np.uint8)
    inside = np.ones(len(values), bool)
    inside[np.cumsum([len(text) for text in known], dtype=np.int64) - 1] = False
    first = np.flatnonzero(inside)
    found = np.zeros((256, 256), bool)
    found[values[first], values[first + 1]] = True
    return found


# ---------------------------------------------------------------------------------------------- SentencePiece

_TRAINER, _NORMALIZER = 2, 3  # fields of a model
_MODEL_TYPE, _SPACE_BEHIND = 3, 24  # fields of a trainer's settings
_BPE = 2
_RULES, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5  # fields of a normaliser's settings
_SELF_TEST = 4
_PIECE, _SCORE = 1, 2  # fields of a model, and of a piece


def of_sentencepiece(model: Any) -> Boundaries | None:
    """The boundaries of a SentencePieceProcessor, in its texts as they are, with U+2581 written as a space."""
    settings: dict[tuple[int, int], int | bytes] = {}
    for number, value, _ in message_fields(model.serialized_model_proto()):
        if number in (_TRAINER, _NORMALIZER) and isinstance(value, bytes):
            settings |= {(number, inner): setting for inner, setting, _ in message_fields(value)}
    ids = range(model.vocab_size())
    if (
        settings.get((_TRAINER, _MODEL_TYPE)) != _BPE
        or settings.get((_TRAINER, _SPACE_BEHIND), 0)
        or settings.get((_NORMALIZER, _RULES), b"")
        or settings.get((_NORMALIZER, _REMOVE_SPACES), 1)
        or not settings.get((_NORMALIZER, _ESCAPE_SPACES), 1)
        # Without bytes to fall back on, unknown characters side by side become one unknown piece.
        or not any(map(model.is_byte, ids))
        # How an unused piece comes apart again depends on where else the text has it.
        or any(map(model.is_unused, ids))
    ):
        return None
    others = (model.is_byte, model.is_control, model.is_unknown)
    pieces = (model.id_to_piece(each) for each in ids if not any(kind(each) for kind in others))
    boundaries = ~_pairs(piece.replace("\u2581", " ").encode() for piece in pieces)
    boundaries[:, _CONTINUATION] = False
    return boundaries.ravel()


def merges_by_score(model: bytes) -> bool:
    """Whether a SentencePiece model, given as its file's content, is BPE: the higher a piece's score, the earlier."""
    kind = None
    for number, value, _ in message_fields(model):
        if number == _TRAINER and isinstance(value, bytes):
            kind = next((setting for inner, setting, _ in message_fields(value) if inner == _MODEL_TYPE), kind)
    return kind == _BPE


def lowest_score(model: bytes) -> float:
    """The lowest score of a SentencePiece model's pieces."""
    scores = [0.0]
    for number, piece, _ in message_fields(model):
        if number == _PIECE and isinstance(piece, bytes):
            scores += [struct.unpack("<f", value)[0] for n, value, _ in message_fields(piece) if n == _SCORE]  # type: ignore[arg-type]
    return min(scores)


def with_pieces(model: bytes, pieces: Sequence[str]) -> bytes:
    """A SentencePiece model with more pieces behind its own, each of a lower score than those before it."""
    lowest = lowest_score(model)
    added = []
    for rank, piece in enumerate(pieces, start=1):
        text = piece.encode()
        fields = bytes([1 << 3 | 2, *_varint(len(text))]) + text + bytes([_SCORE << 3 | 5])
        fields += struct.pack("<f", lowest - rank)
        added.append(bytes([_PIECE << 3 | 2, *_varint(len(fields))]) + fields)
    return model + b"".join(added)


def _varint(number: int) -> list[int]:
    head = []
    while number > 0x7F:
        head.append(number & 0x7F | 0x80)
        number >>= 7
    return [*head, number]


def adds_space_in_front(model: bytes) -> bool:
    """Whether a SentencePiece model, given as its file's content, encodes a text as if a space stood before it."""
    added = 1
    for number, value, _ in message_fields(model):
        if number == _NORMALIZER and isinstance(value, bytes):
            added = next((int(setting) for inner, setting, _ in message_fields(value) if inner == _DUMMY_PREFIX), added)
    return bool(added)


def without_space_in_front(model: bytes) -> bytes:
    """The same model, but for the space that it adds; for the later parts of a text that was cut."""
    # Settings that are given once more at the end win. The self-test is of the model as it was.
    kept = b"".join(raw for number, _, raw in message_fields(model) if number != _SELF_TEST)
    return kept + bytes([_NORMALIZER << 3 | 2, 2, _DUMMY_PREFIX << 3, 0])


def message_fields(message: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """The fields of a protocol buffers message: (number, value, all of its bytes); 32 and 64 bit values as bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (message[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 0x80:
                return value, at

    at = 0
    while at < len(message):
        begun = at
        key, at = varint(at)
        value: int | bytes
        if key & 7 == 0:
            value, at = varint(at)
        else:
            size, at = {1: (8, at), 5: (4, at)}.get(key & 7) or varint(at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value, message[begun:at]


# ---------------------------------------------------------------------------------------------- Hugging Face

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MIXED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = (
    _GPT2,
    # cl100k and Llama 3; Qwen 2; o200k; Tekken
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    rf"{_MIXED}{_SHORT}?|{_UPPER}{_SHORT}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    rf"{_MIXED}|{_UPPER}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
)
"""The patterns that are known to split at `_word_ends`."""


def _word_ends() -> npt.NDArray[np.bool_]:
    """bool [256, 256]: where every pattern of PATTERNS ends a match.

    An ASCII letter, digit or mark ends before a byte of another class, but for what may belong to a contraction (a
    letter and an apostrophe) and for a mark before a letter, which many patterns take along. Letters and digits end
    before any white space; a mark before a space only, as many patterns take line breaks along. A character
    beyond ASCII ends before a space unless its last byte could be that of white space.
    """
    codes = np.arange(256)
    letter = np.array([chr(code).isalpha() and code < 128 for code in codes])
    digit = np.array([chr(code).isdigit() and code < 128 for code in codes])
    mark = (codes > 32) & (codes < 127) & ~letter & ~digit
    beyond = _CONTINUATION.copy()
    for code in range(0x80, 0x3001):
        if chr(code).isspace():
            beyond[chr(code).encode()[-1]] = False
    space = codes == 32
    white = space | np.isin(codes, list(b"\t\n\r"))
    ends: npt.NDArray[np.bool_] = (letter[:, None] & (digit | mark | white)) | (
        digit[:, None] & (letter | mark | white)
    )
    ends |= (mark[:, None] & (digit | space)) | (beyond[:, None] & space)
    ends[letter, ord("'")] = False
    return ends


def of_hugging_face(tree: dict[str, Any]) -> Boundaries | None:
    """The boundaries of the tokenizer whose tokenizer.json holds `tree`."""
    added = tree.get("added_tokens") or []
    if (
        not _splits_words(tree.get("pre_tokenizer"))
        or (tree.get("normalizer") or {"type": "NFC"}) != {"type": "NFC"}  # composes nothing with ASCII behind it
        or tree["model"].get("dropout")
        # They look at what stands behind them.
        or any(token.get("rstrip") or token.get("single_word") for token in added)
    ):
        return None
    names = [token["content"] for token in added]
    names += [unicodedata.normalize("NFC", name) for name in names]
    return np.asarray(_word_ends() & ~_pairs(name.encode() for name in names)).ravel()


def _splits_words(step: dict[str, Any] | None) -> bool:
    """Whether this pre-tokenizer is one of the known patterns, then or therewith mapped to the byte-level alphabet."""
    steps = step.get("pretokenizers", []) if step and step.get("type") == "Sequence" else [step]
    *before, last = [each or {} for each in steps]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return False
    if before and before[0].get("type") == "Digits":
        before = before[1:]
    if last.get("use_regex", True):
        return not before
    return len(before) == 1 and (
        before[0].get("type") == "Split"
        and before[0].get("pattern", {}).get("Regex") in PATTERNS
        and before[0].get("behavior") == "Isolated"
        and not before[0].get("invert")
    )


def without_prefix(node: Any) -> Any:
    """A tokenizer.json's tree without the space that some put before a text; for later parts of one that was cut."""
    if isinstance(node, list):
        return [without_prefix(each) for each in node if not _is_prepend(each)]
    if not isinstance(node, dict):
        return node
    changed = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {
        key: changed[key] if key in changed else None if _is_prepend(each) else without_prefix(each)
        for key, each in node.items()
    }


def _is_prepend(node: Any) -> bool:
    return isinstance(node, dict) and node.get("type") == "Prepend"
