"""Exact duplicates: documents whose texts have one hash. Of copies the first in the order of the inputs stays.

Only the shards' columns of hashes are read, and all of it is decided in one process, so it depends on nothing but the
documents and their order. Memory: 9 bytes for each new document and 8 for each one known before, and a sixteenth of
both, sorted, at a time. Two different texts of one hash (one pair is expected among 6 billion documents) count as
copies.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megacl.data.manifest import Hashes
from megacl.data.shard_list import DTypeName, Mask, ShardList
from megacl.data.shards import open_documents

_PART_BITS = 4


def hashes_of(folder: Path, shards: ShardList, dtype: DTypeName) -> Hashes:
    """The hashes of all documents of some shards, in order: uint64 [documents]. DataError if a shard is damaged."""
    found = np.empty(int(shards.numbers("documents").sum()), np.uint64)
    end = 0
    for row in shards:
        hashes = open_documents(folder, row, dtype).hashes
        found[end : end + len(hashes)] = hashes
        end += len(hashes)
    return found


def is_known(hashes: Hashes, known: Sequence[Hashes]) -> Mask:
    """Which documents are among those of some lists: bool [N]."""
    return _by_parts(hashes, known, first_only=False)


def is_repeated(hashes: Hashes, known: Sequence[Hashes] = ()) -> Mask:
    """Which documents are among those of some lists, or not the first of their hash: bool [N]."""
    return _by_parts(hashes, known, first_only=True)


def _by_parts(hashes: Hashes, known: Sequence[Hashes], first_only: bool) -> Mask:
    found = np.zeros(len(hashes), np.bool_)
    shift = np.uint64(64 - _PART_BITS)
    for part in range(2**_PART_BITS):
        mine = np.flatnonzero(hashes >> shift == part)
        chosen = hashes[mine]
        others = np.unique(np.concatenate([np.empty(0, np.uint64), *(each[each >> shift == part] for each in known)]))
        gone = np.isin(chosen, others)
        if first_only:
            later = np.ones(len(mine), np.bool_)
            later[np.unique(chosen, return_index=True)[1]] = False
            gone |= later
        found[mine] = gone
    return found
