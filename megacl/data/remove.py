"""Documents taken out of a data folder: `megacl data remove DIR --documents FILE | --hashes FILE | --matching REGEX`.

    with changing(Path("data/english")) as state:
        matches = find_documents(state, Wanted(hashes=hashes))
        report = remove_documents(state, matches)

Shards that hold such documents are written anew without them, which makes a generation. removed.arrow keeps the hashes,
also those that were asked for and are of no document there (yet, or not any more), so the documents do not come in with
a later prepare or merge. A pattern finds what is there, and says nothing about what comes later.

Earlier generations stay as they are, and so do runs that pin them, unless `purge` deletes every shard that holds one of
the documents: then the bytes are gone, and a generation that had such a shard cannot be read any more. The raw inputs
and checkpoints are not touched.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megacl.data.documents import read_documents
from megacl.data.forms.reading import Reading
from megacl.data.generations import CHANGE_WORK, PREPARE_WORK, Change, FolderState, publish_generation
from megacl.data.manifest import Hashes, read_removed
from megacl.data.rewrite import without_documents
from megacl.data.shard_list import DTypeName, ShardRow
from megacl.data.shards import hash_of, open_documents
from megacl.data.tokenizer import load_tokenizer
from megacl.data.workers import run_on_workers
from megacl.errors import ConfigError, DataError


@dataclass(frozen=True)
class Wanted:
    """Which documents are to be found: those with one of the hashes, and those whose text the pattern is found in."""

    hashes: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    pattern: str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(f"matching {self.pattern!r} is not a regular expression: {error}.") from None


def hashes_of_texts(inputs: Sequence[str], reading: Reading | None = None) -> Hashes:
    """The hashes of all documents of some inputs, sorted. DataError as for read_documents."""
    return np.unique(np.array([hash_of(text.encode()) for text in read_documents(inputs, reading)], np.uint64))


def read_hashes(file: Path) -> Hashes:
    """The hashes in a file, 16 hexadecimal digits a line, sorted. DataError names a line that is something else."""
    found = []
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from None
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r"[0-9a-fA-F]{16}", line.strip()):
            raise DataError(f"{file}:{number}: not a hash of 16 hexadecimal digits. Mend or delete the line.")
        found.append(int(line, 16))
    return np.unique(np.array(found, np.uint64))


@dataclass(frozen=True)
class Matches:
    """The documents found in a folder, in all of its generations whose shards are on the disk."""

    hashes: Hashes
    """Of the documents, sorted, each once."""
    absent: Hashes
    """Those asked for that are of no document there, likewise."""
    places: dict[int, npt.NDArray[np.int64]]
    """Row of the folder's list of shards -> the numbers of the documents in that shard."""
    documents: int
    """Of the newest generation, held-out ones included; tokens and text_bytes are theirs."""
    held_out: int
    tokens: int
    text_bytes: int


def find_documents(state: FolderState, wanted: Wanted, workers: int) -> Matches:
    """Looks at every document of every shard, on several processes; a pattern makes them decode all texts."""
    finder = partial(_Finder, state.folder, state.dtype, wanted, state.folder / state.tokenizer.file)
    current = state.shards.is_at(state.number)
    held_out = state.shards.held_out()

    def tasks() -> Iterator[tuple[int, ShardRow]]:
        for index, row in enumerate(state.shards):
            if current[index] or (state.folder / row.path).exists():  # else it was purged
                yield index, row

    places, hashes, counts = {}, [np.empty(0, np.uint64)], np.zeros(4, np.int64)
    with contextlib.closing(run_on_workers(finder, tasks(), workers)) as results:
        for index, found in results:
            if len(found.places):
                places[index] = found.places
                hashes.append(found.hashes)
                if current[index]:
                    documents = len(found.places)
                    counts += [documents, documents * bool(held_out[index]), found.tokens, found.text_bytes]
    every = np.unique(np.concatenate(hashes))
    return Matches(every, np.setdiff1d(wanted.hashes, every), dict(sorted(places.items())), *map(int, counts))


@dataclass(frozen=True)
class _Found:
    """The documents found in one shard."""

    places: npt.NDArray[np.int64]
    hashes: Hashes
    tokens: int
    text_bytes: int


class _Finder:
    """Finds documents in a shard; one in every worker."""

    def __init__(self, folder: Path, dtype: DTypeName, wanted: Wanted, tokenizer_file: Path) -> None:
        self.folder, self.dtype, self.hashes = folder, dtype, wanted.hashes
        self.pattern = re.compile(wanted.pattern) if wanted.pattern is not None else None
        self.tokenizer = load_tokenizer(tokenizer_file) if self.pattern else None

    def __call__(self, task: tuple[int, ShardRow]) -> tuple[int, _Found]:
        index, row = task
        documents = open_documents(self.folder, row, self.dtype)
        chosen = np.isin(documents.hashes, self.hashes)
        if self.pattern and self.tokenizer:
            for place in np.flatnonzero(~chosen).tolist():
                if self.pattern.search(self.tokenizer.decode(documents.tokens(place)[:-1])):
                    chosen[place] = True
        tokens = int(np.diff(documents.offsets)[chosen].sum())
        return index, _Found(
            np.flatnonzero(chosen), documents.hashes[chosen], tokens, int(documents.text_bytes[chosen].sum())
        )


@dataclass(frozen=True)
class RemoveReport:
    """What removing changed."""

    generation: int | None
    """The one that it made; None where nothing was to be done."""
    unreadable: tuple[int, ...]
    """Earlier generations that were purged."""
    files: int
    """How many shards were deleted from the disk."""
    recorded: int
    """How many hashes the list of removed documents has more than before."""


def remove_documents(state: FolderState, matches: Matches, *, purge: bool = False, workers: int = 1) -> RemoveReport:
    """Publishes the generation without the documents found, in which all hashes asked for are recorded as removed.

    Nothing is done where that would change nothing. DataError if nothing would be left, or the disk refuses.
    purge: delete from the disk every shard of earlier generations that holds one of the documents.
    """
    if purge and (state.folder / PREPARE_WORK).exists():
        raise DataError(
            f"{state.folder / PREPARE_WORK}: work of a prepare that is not published may hold the documents too. Merge "
            "or finish it, or delete it, then purge."
        )
    holding = np.zeros(len(state.shards), np.bool_)
    holding[list(matches.places)] = True
    known = read_removed(state.folder, state.generations).hashes
    recorded = np.setdiff1d(np.concatenate([matches.hashes, matches.absent]), known)
    if not (matches.documents or len(recorded) or (purge and holding.any())):
        return RemoveReport(None, (), 0, 0)
    current = state.shards.where(state.shards.is_at(state.number))
    keep = np.ones(int(current.numbers("documents").sum()), np.bool_)
    begins = np.cumsum(current.numbers("documents")) - current.numbers("documents")
    rows = dict(zip(np.flatnonzero(state.shards.is_at(state.number)).tolist(), begins.tolist(), strict=True))
    for row, places in matches.places.items():
        if row in rows:
            keep[rows[row] + places] = False
    going, added = without_documents(state, keep, workers)
    made = publish_generation(
        state,
        state.folder / CHANGE_WORK,
        Change(
            made_by="remove",
            settings={"purge": purge},
            added=added,
            going=going,
            removed=recorded,
            removed_documents=matches.documents,
            purged=holding if purge else None,
        ),
    )
    lost = [each.generation for each in state.generations if (holding & state.shards.is_at(each.generation)).any()]
    files = int(holding.sum()) if purge else 0
    return RemoveReport(made.generation, tuple(lost) if purge else (), files, len(recorded))
