"""Texts -> ids: by units, each distinct one encoded once, or as they are; very long ones in parts either way.

    encoder = UnitEncoder(boundaries, encode)    # boundaries: data/boundaries.py; encode: list of parts -> their ids
    encoder(["some text"])                       # [uint32 array], what encode gives for the whole text

A language repeats itself. Cut wherever no token can lie across the cut, a text falls into units of a few bytes, most of
which were met before. Their ids are looked up; only what is new goes through the tokenizer.

A tokenizer is given at most LONGEST characters as one text. By units, a longer text is cut at a boundary, so its ids
are those of the whole, unless it has no boundary for so long. As it is, it is cut before a space, or where it has none.
Around a cut that is no boundary the ids may differ from those of the whole; the text that they stand for does not.
Where a text is cut depends on nothing but the text.

Memory: twice the ids; what the tokenizer takes for LONGEST characters (short texts go together while they have fewer
than TOGETHER); and about 100 MB for the units that are remembered, REMEMBERED of at most REMEMBERED_BYTES each and
those of one group of texts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megacl.data.boundaries import Boundaries

LONGEST = 2**20
TOGETHER = 2**18
GROUP_BYTES = 2**22
REMEMBERED = 2**19
REMEMBERED_BYTES = 64

Text = TypeVar("Text", str, bytes)
Ids = npt.NDArray[np.uint32]


class UnitEncoder:
    """Texts -> ids, through a memory of the ids of units."""

    def __init__(self, boundaries: Boundaries, encode: Callable[[list[bytes]], Iterable[Sequence[int]]]) -> None:
        self._boundaries = boundaries
        self._encode = encode
        # What is met joins the recent ones. When these are many they become the earlier ones, which are forgotten.
        self._recent: dict[bytes, bytes] = {}
        self._earlier: dict[bytes, bytes] = {}

    def __call__(self, texts: Iterable[str]) -> list[Ids]:
        """The ids of each text, uint32 [length], read-only."""
        found: list[list[Ids]] = []
        group: list[tuple[int, bytes]] = []
        held = 0
        for owner, text in enumerate(texts):
            found.append([])
            for part in self._parts(text):
                group.append((owner, part))
                held += len(part)
                if held >= GROUP_BYTES:
                    self._encode_group(group, found)
                    group, held = [], 0
        if group:
            self._encode_group(group, found)
        return [parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint32), *parts]) for parts in found]

    def _parts(self, text: str) -> Iterator[bytes]:
        """The text as UTF-8; in parts where it is very long, and in none where it is empty."""
        start = 0
        while len(text) - start > LONGEST:
            part = text[start : start + LONGEST].encode()
            cuts = np.flatnonzero(self._is_cut(part))
            if cuts.size:
                part = part[: int(cuts[-1]) + 1]
            yield part
            start += len(part.decode())
        if start < len(text):
            yield text[start:].encode()

    def _is_cut(self, data: bytes) -> npt.NDArray[np.bool_]:
        """bool [len - 1]: whether the data may be cut behind each byte."""
        values = np.frombuffer(data, np.uint8)
        pairs = values[:-1].astype(np.uint16)
        pairs <<= 8
        pairs |= values[1:]
        return self._boundaries[pairs]

    def _encode_group(self, group: Sequence[tuple[int, bytes]], found: list[list[Ids]]) -> None:
        """Adds the ids of each part to those found for its owner."""
        data = b"".join(part for _, part in group)
        ends = np.cumsum([len(part) for _, part in group])
        is_cut = self._is_cut(data)
        is_cut[ends[:-1] - 1] = True
        bounds = np.concatenate([[0], np.flatnonzero(is_cut) + 1, [len(data)]]).astype(np.int32)
        units = pa.Array.from_buffers(
            pa.binary(), len(bounds) - 1, [None, pa.py_buffer(bounds), pa.py_buffer(data)]
        ).dictionary_encode()
        ids = self._ids_of(units.dictionary.to_pylist()).take(units.indices)
        values = np.frombuffer(ids.values.buffers()[1], np.uint32)
        token_ends = np.frombuffer(ids.offsets.buffers()[1], np.int32)[np.searchsorted(bounds, ends)].tolist()
        for (owner, _), start, end in zip(group, [0, *token_ends[:-1]], token_ends, strict=True):
            found[owner].append(values[start:end])

    def _ids_of(self, units: list[bytes]) -> pa.ListArray:
        """The ids of each of these distinct units."""
        if len(self._recent) > REMEMBERED // 2:
            self._recent, self._earlier = {}, self._recent
        recent, earlier = self._recent, self._earlier
        unmet = [unit for unit in units if unit not in recent]
        recent.update((unit, earlier[unit]) for unit in unmet if unit in earlier)
        new = [unit for unit in unmet if unit not in earlier]
        for group in _groups(new):
            for unit, ids in zip(group, self._encode(group), strict=True):
                recent[unit] = np.array(ids, np.uint32).tobytes()
        found = [recent[unit] for unit in units]
        for unit in new:
            if len(unit) > REMEMBERED_BYTES:
                del recent[unit]
        ends = np.zeros(len(found) + 1, np.int32)
        np.cumsum([len(ids) // 4 for ids in found], out=ends[1:])
        # From buffers: pa.array would import pandas where that is installed, for a second.
        values = pa.Array.from_buffers(pa.uint32(), int(ends[-1]), [None, pa.py_buffer(b"".join(found))])
        return pa.ListArray.from_buffers(
            pa.list_(pa.uint32()), len(found), [None, pa.py_buffer(ends)], children=[values]
        )


class WholeEncoder:
    """Texts -> ids, each text as it is, for tokenizers of which no boundaries are known.

    encode: list of texts -> their ids; encode_later does the same for parts that stand behind others in their text.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], Iterable[Sequence[int] | Ids]],
        encode_later: Callable[[list[str]], Iterable[Sequence[int] | Ids]],
    ) -> None:
        self._encode = encode
        self._encode_later = encode_later

    def __call__(self, texts: Iterable[str]) -> list[Ids]:
        """The ids of each text, uint32 [length], which may be read-only."""
        found: list[Ids] = []
        for group in _groups(texts):
            begun = self._encode([text[: _end_of_part(text, 0)] for text in group])
            found += [self._with_rest(text, ids) for text, ids in zip(group, begun, strict=True)]
        return found

    def _with_rest(self, text: str, begun: Sequence[int] | Ids) -> Ids:
        """The ids of a text, given those of its first part."""
        parts = [np.asarray(begun, np.uint32)]
        start = _end_of_part(text, 0)
        while start < len(text):
            end = _end_of_part(text, start)
            parts += [np.asarray(ids, np.uint32) for ids in self._encode_later([text[start:end]])]
            start = end
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _groups(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """The texts in groups of which each but the last has TOGETHER characters, or more by a part of its last text."""
    group: list[Text] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def _end_of_part(text: str, start: int) -> int:
    """Where the part that begins at `start` ends: with the text, or before a space, or where it is LONGEST."""
    if len(text) - start <= LONGEST:
        return len(text)
    space = text.rfind(" ", start + 1, start + LONGEST)
    return start + LONGEST if space < 0 else space
