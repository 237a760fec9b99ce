"""Megatron's indexed datasets: token ids in PREFIX.bin, where each document begins and ends in PREFIX.idx.

    dataset = open_megatron("corpus_text_document")
    dataset.tokens(7)                                        # the ids of document 7
    write_megatron("copy", map(dataset.tokens, range(len(dataset))), np.dtype(np.uint16))

The .bin file is the ids of all sequences behind one another. The .idx file, little-endian:

    9 bytes    "MMIDIDX", two zeros         int32 [S]      ids in each sequence
    uint64     version, 1                   int64 [S]      the byte of .bin at which each sequence begins
    uint8      code of the ids' type        int64 [D]      the sequence with which each document begins, then S
    uint64     S, the sequences             uint8 [S]      only in multimodal sets, which are refused
    uint64     D, the documents plus one

Both files are mapped, so opening costs no memory, and checking the index is one pass over it.
"""

import os
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megacl.errors import DataError
from megacl.publish import disk_errors, flush_folder, name_beside

Ids = npt.NDArray[np.integer[Any]]

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES: dict[int, str] = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
_CHECKED_AT_ONCE = 2**20
_MAX_LENGTH = 2**31 - 1


@dataclass(frozen=True)
class MegatronDataset:
    """The documents of a .bin and .idx file."""

    values: Ids
    """The ids of all documents behind one another, mapped, [tokens]."""
    _begins: npt.NDArray[np.int64]
    """The byte of .bin at which each sequence begins, mapped, [sequences]."""
    _documents: npt.NDArray[np.int64]
    """The sequence with which each document begins, and the number of sequences: mapped, [documents + 1]."""

    def __len__(self) -> int:
        return len(self._documents) - 1

    def begin(self, document: int) -> int:
        """Where in `values` a document begins; of the number of documents, the end of the last."""
        sequence = int(self._documents[document])
        if sequence == len(self._begins):
            return len(self.values)
        return int(self._begins[sequence]) // self.values.itemsize

    def tokens(self, document: int) -> Ids:
        """The ids of one document, [length], a view."""
        return self.values[self.begin(document) : self.begin(document + 1)]


def open_megatron(prefix: str, check: bool = True) -> MegatronDataset:
    """Maps PREFIX.bin and PREFIX.idx. DataError if one is missing, or they are not what they should be.

    check: read the whole index to see that it describes all of the .bin file, in order; without it only sizes are
    compared.
    """
    index = f"{prefix}.idx"
    for name in (index, f"{prefix}.bin"):
        if not os.path.exists(name):
            raise DataError(f"{name}: no such file, and a Megatron dataset is a .bin and an .idx file. Copy both.")
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{index}: not a Megatron index: it does not begin with MMIDIDX. Copy it again.")
    _, version, code, sequences, entries = _HEADER.unpack(header)
    if version != 1 or code not in _TYPES or entries < 1:
        raise DataError(
            f"{index}: a Megatron index of version {version} with ids of type {code} and {entries} document entries; "
            "version 1 with ids of whole numbers can be read. Copy it again, or make it again."
        )
    expected, found = _HEADER.size + 12 * sequences + 8 * entries, os.path.getsize(index)
    if found != expected:
        kind = "of a multimodal set, which cannot be read" if found == expected + sequences else "truncated or damaged"
        raise DataError(
            f"{index}: {found:,} bytes, but {sequences:,} sequences and {entries - 1:,} documents take {expected:,}; "
            f"it is {kind}. Copy it again."
        )
    dtype = np.dtype(_TYPES[code])
    lengths, begins, documents = (
        _map(index, kind, offset, count)
        for kind, offset, count in (
            ("<i4", _HEADER.size, sequences),
            ("<i8", _HEADER.size + 4 * sequences, sequences),
            ("<i8", _HEADER.size + 12 * sequences, entries),
        )
    )
    size = os.path.getsize(f"{prefix}.bin")
    if check:
        _check_index(index, lengths, begins, documents, dtype.itemsize, size)
    return MegatronDataset(_map(f"{prefix}.bin", dtype.str, 0, size // dtype.itemsize), begins, documents)


def _map(name: str, kind: str, offset: int, count: int) -> Any:
    # Nothing cannot be mapped. A plain array, since slices of a np.memmap cost ten times as much.
    if not count:
        return np.empty(0, kind)
    return np.asarray(np.memmap(name, kind, "r", offset, (count,)))


def _check_index(index: str, lengths: Ids, begins: Ids, documents: Ids, itemsize: int, size: int) -> None:
    """DataError unless the sequences lie behind one another, fill the .bin file, and the documents are all of them."""
    end = 0
    for first in range(0, len(lengths), _CHECKED_AT_ONCE):
        part = slice(first, first + _CHECKED_AT_ONCE)
        ends = end + np.cumsum(lengths[part], dtype=np.int64) * itemsize
        if (lengths[part] < 0).any() or (begins[part] != np.concatenate(([end], ends[:-1]))).any():
            raise DataError(
                f"{index}: its sequences do not lie one behind the other; it is damaged, or of another .bin file. "
                "Copy both again."
            )
        end = int(ends[-1])
    if end != size:
        raise DataError(
            f"{index}: its sequences take {end:,} bytes, but the .bin file has {size:,}; one of the two is truncated, "
            "or they do not belong together. Copy both again."
        )
    before = 0
    for first in range(0, len(documents), _CHECKED_AT_ONCE):
        chunk = documents[first : first + _CHECKED_AT_ONCE]
        if (chunk[:1] < before).any() or (np.diff(chunk) < 0).any():
            before = -1
            break
        before = int(chunk[-1])
    if documents[0] != 0 or before != len(lengths):
        raise DataError(f"{index}: its documents do not hold every sequence once, in order; it is damaged. Copy again.")


def write_megatron(prefix: str | Path, documents: Iterable[Ids], dtype: npt.DTypeLike) -> int:
    """Publishes PREFIX.bin and PREFIX.idx, a sequence a document, and returns how many documents they hold.

    dtype: of the ids in the file, such as uint16 or int32; ValueError for an id that does not fit it. The documents are
    written as they come: memory is 4 bytes a document. DataError if the disk refuses; no .idx file is there then.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    code = next((code for code, name in _TYPES.items() if np.dtype(name) == kind), None)
    if code is None:
        raise ValueError(f"Megatron's datasets know no ids of type {kind}")
    binary, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    lengths = array("i")
    beside = [name_beside(path) for path in (binary, index)]
    with disk_errors(binary, "a Megatron dataset"):
        try:
            with open(beside[0], "wb") as file:
                for ids in documents:
                    file.write(_converted(ids, kind).tobytes())
                    lengths.append(len(ids))
                file.flush()
                os.fsync(file.fileno())
            with open(beside[1], "wb") as file:
                file.write(_HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
                counts = np.frombuffer(lengths, np.int32) if lengths else np.empty(0, np.int32)
                counts.tofile(file)
                ends = np.cumsum(counts, dtype=np.int64)
                ((ends - counts) * kind.itemsize).tofile(file)
                np.arange(len(counts) + 1, dtype=np.int64).tofile(file)
                file.flush()
                os.fsync(file.fileno())
            index.unlink(missing_ok=True)  # without it there is no dataset, rather than half of two
            os.replace(beside[0], binary)
            os.replace(beside[1], index)
            flush_folder(binary.parent)
        finally:
            for path in beside:
                path.unlink(missing_ok=True)
    return len(lengths)


def _converted(ids: Ids, kind: np.dtype[Any]) -> Ids:
    if len(ids) > _MAX_LENGTH:
        raise ValueError(f"a Megatron sequence holds at most {_MAX_LENGTH} ids, not {len(ids)}")
    limits = np.iinfo(kind)
    if len(ids) and not limits.min <= int(ids.min()) <= int(ids.max()) <= limits.max:
        raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit {kind}")
    return ids.astype(kind)
