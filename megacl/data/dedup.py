"""Duplicates taken out of a prepared folder: `megacl data dedup DIR --near 0.8 [--against DIR...]`, or --exact.

    with changing(Path("data/web")) as state:
        report = dedup_documents(state, near=0.8, against=[Path("data/tests")], workers=8)

Of documents that are duplicates of one another the first stays, but a held-out one before all others: a training
document that is a duplicate of a held-out one goes, also of one that another folder (`against`) holds out. So nothing
that is held out is trained on, as it is or nearly. What stays makes a new generation.

Signatures are made on all cores, a file a shard, and found again after an interruption: 512 bytes a document. Which
documents go is decided in one process (data/near.py), so it depends on nothing but the documents and their order.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacl.data.duplicates import hashes_of, is_known, is_repeated
from megacl.data.generations import CHANGE_WORK, Change, FolderState, open_state, publish_generation
from megacl.data.near import PERMUTATIONS, SHINGLE_WORDS, Signatures, is_near, load_minhash, sign
from megacl.data.rewrite import without_documents
from megacl.data.shard_list import DTypeName, Mask, ShardList, ShardRow
from megacl.data.shards import open_documents
from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.data.workers import run_on_workers
from megacl.errors import ConfigError
from megacl.publish import disk_errors, publish_bytes

_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class DedupReport:
    """What was found, and the generation that is without it."""

    generation: int | None  # None: nothing was changed
    train: int  # documents that went, or would
    held_out: int
    of: int  # documents before


def dedup_documents(
    state: FolderState,
    *,
    near: float | None = None,
    exact: bool = False,
    against: Sequence[Path] = (),
    workers: int = 1,
    dry_run: bool = False,
) -> DedupReport:
    """Publishes a generation without duplicates, if there are any.

    near: the similarity from which documents are duplicates, in (0, 1]; exact: those of the same text are. against:
    folders whose held-out documents are compared too. ConfigError: neither is asked for, or near is out of range.
    DataError: a folder or the disk. LaunchError: rensa is not installed, or a worker was killed.
    """
    if near is None and not exact:
        raise ConfigError("say what a duplicate is: --exact, or --near SIMILARITY, such as 0.8.")
    if near is not None and not 0 < near <= 1:
        raise ConfigError(f"near is {near}; it must lie in (0, 1]. It is the part of five-word runs that is shared.")
    others = [open_state(each) for each in against]
    current = state.current()
    counts = current.numbers("documents")
    held_out = np.repeat(current.held_out(), counts)
    gone = np.zeros(len(held_out), np.bool_)
    if exact:
        hashes = hashes_of(state.folder, current, state.dtype)
        known = [hashes_of(each.folder, each.current().split("validation"), each.dtype) for each in others]
        gone |= is_repeated(hashes) | (is_known(hashes, known) & ~held_out)
    if near is not None:
        gone |= _near_ones(state, others, held_out, near, workers)
    counted = {"train": int((gone & ~held_out).sum()), "held_out": int((gone & held_out).sum()), "of": len(gone)}
    if dry_run or not gone.any():
        return DedupReport(None, **counted)
    going, added = without_documents(state, ~gone, workers)
    made = publish_generation(
        state,
        state.folder / CHANGE_WORK,
        Change(
            made_by="dedup",
            settings={
                **({"exact": True} if exact else {}),
                **({"near": near} if near is not None else {}),
                **(
                    {"against": ", ".join(f"{each.folder.resolve()}@{each.number}" for each in others)}
                    if others
                    else {}
                ),
            },
            added=added,
            going=going,
            removed_documents=int(gone.sum()),
        ),
    )
    return DedupReport(made.generation, **counted)


def _near_ones(state: FolderState, others: Sequence[FolderState], held_out: Mask, near: float, workers: int) -> Mask:
    """Which of the folder's documents go: bool [documents]."""
    work = state.folder / CHANGE_WORK
    shards = [shard for each in others for shard in _shards(each, each.current().split("validation"), work)]
    foreign = sum(shard.row.documents for shard in shards)
    shards += _shards(state, state.current(), work)
    signatures = _sign_shards(shards, work, workers)
    classes = np.concatenate([np.zeros(foreign, np.uint8), np.where(held_out, 1, 2).astype(np.uint8)])
    return is_near(signatures, classes, near)[foreign:]


@dataclass(frozen=True)
class _Shard:
    """A shard to be signed, as it is sent to a worker."""

    folder: Path
    row: ShardRow
    dtype: DTypeName
    tokenizer_file: Path
    signatures: Path
    """Where they go."""


def _shards(state: FolderState, rows: ShardList, work: Path) -> Iterator[_Shard]:
    method = f"{state.tokenizer.fingerprint} {SHINGLE_WORDS} {PERMUTATIONS} {load_minhash().ALGORITHM_VERSION}"
    for row in rows:
        name = hashlib.sha256(f"{row.sha256} {method}".encode()).hexdigest()[:32]
        tokenizer_file = state.folder / state.tokenizer.file
        yield _Shard(state.folder, row, state.dtype, tokenizer_file, work / f"{name}.npy")


def _sign_shards(shards: Sequence[_Shard], work: Path, workers: int) -> Signatures:
    """The signatures of the documents of all shards, mapped."""
    missing = (shard for shard in shards if not shard.signatures.exists())
    with contextlib.closing(run_on_workers(_Signer, missing, workers)) as results:
        for _ in results:
            pass
    whole = work / "signatures"  # one map, since a process may have far fewer maps than there may be shards
    with disk_errors(whole, "signatures"), open(whole, "wb") as file:
        for shard in shards:
            file.write(np.load(shard.signatures).tobytes())
    return np.memmap(whole, np.uint32, "r").reshape(-1, PERMUTATIONS)


class _Signer:
    """Signs the documents of a shard; one in every worker."""

    def __init__(self) -> None:
        self.tokenizers: dict[Path, Tokenizer] = {}

    def __call__(self, shard: _Shard) -> None:
        if shard.tokenizer_file not in self.tokenizers:
            self.tokenizers[shard.tokenizer_file] = load_tokenizer(shard.tokenizer_file)
        tokenizer = self.tokenizers[shard.tokenizer_file]
        documents = open_documents(shard.folder, shard.row, shard.dtype)
        parts = []
        for first in range(0, len(documents), _BATCH_DOCUMENTS):
            batch = range(first, min(first + _BATCH_DOCUMENTS, len(documents)))
            parts.append(sign([tokenizer.decode(documents.tokens(index)[:-1]) for index in batch]))
        content = io.BytesIO()
        np.save(content, np.concatenate(parts))
        publish_bytes(shard.signatures, content.getvalue(), "signatures")
