"""Shards without some of their documents, written beside the old ones on several processes, each shard once.

The name of a new shard is a hash of the old one's content and of which documents stay, so a command that was killed
finds what it had done. A worker holds a shard's tokens twice: some 0.3 GB.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from megacl.data.generations import CHANGE_WORK, FolderState
from megacl.data.shard_list import DTypeName, Mask, ShardList, ShardRow
from megacl.data.shards import open_documents, write_shard
from megacl.data.workers import run_on_workers
from megacl.publish import publish_text

_Task = tuple[int, ShardRow, Mask]
_ROW = TypeAdapter(ShardRow)


def rewrite_shards(
    folder: Path, shards: ShardList, keep: Mask, dtype: DTypeName, work: Path, workers: int
) -> tuple[Mask, ShardList, npt.NDArray[np.int64]]:
    """Writes anew, in the work folder, the shards that lose documents, as far as anything is left of them.

    folder: where the shards lie. keep: which documents stay, over all documents of the shards. Returns which shards
    lose documents, bool [shards]; the rows of the new ones; and of each of these the number of the old one.
    """
    counts = shards.numbers("documents")
    ends = np.cumsum(counts)
    kept = np.add.reduceat(keep, ends - counts) if len(counts) else np.empty(0, np.int64)
    losing = kept < counts

    def tasks() -> Iterator[_Task]:
        for index in np.flatnonzero(losing & (kept > 0)).tolist():
            yield index, shards.row(index), keep[ends[index] - counts[index] : ends[index]]

    found: dict[int, ShardRow] = {}
    with contextlib.closing(run_on_workers(partial(_Rewriter, folder, dtype, work), tasks(), workers)) as results:
        found.update(results)
    numbers = sorted(found)
    return losing, ShardList.of_rows([found[index] for index in numbers]), np.array(numbers, np.int64)


def without_documents(state: FolderState, keep: Mask, workers: int) -> tuple[Mask, ShardList]:
    """The change that takes documents out of a folder's newest generation, its new shards written to CHANGE_WORK.

    keep: which documents stay, over all of that generation. Returns which rows of all generations go, and those that
    come.
    """
    work = state.folder / CHANGE_WORK
    losing, added, _ = rewrite_shards(state.folder, state.current(), keep, state.dtype, work, workers)
    going = np.zeros(len(state.shards), np.bool_)
    going[np.flatnonzero(state.shards.is_at(state.number))[losing]] = True
    return going, added


class _Rewriter:
    """Writes a shard without some documents into the work folder, or finds it there; one in every worker."""

    def __init__(self, folder: Path, dtype: DTypeName, work: Path) -> None:
        self.folder, self.dtype, self.work = folder, dtype, work

    def __call__(self, task: _Task) -> tuple[int, ShardRow]:
        index, row, keep = task
        key = hashlib.sha256(bytes.fromhex(row.sha256) + np.packbits(keep).tobytes()).hexdigest()[:32]
        result = self.work / f"{key}.json"
        name = f"{key}-{row.split}.arrow"
        if result.exists() and (self.work / name).exists():
            return index, _ROW.validate_json(result.read_bytes())
        documents = open_documents(self.folder, row, self.dtype).where(keep)
        written = write_shard(self.work / name, documents, split=row.split)
        publish_text(result, str(_ROW.dump_json(written), "utf-8"), "the result of a shard")
        return index, written
