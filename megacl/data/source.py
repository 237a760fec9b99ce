"""A source: one generation of a data folder, on a disk or on a store, as flat streams of tokens.

    source = open_source("data/english")            # reads the manifest and the list of shards, touches no shard
    source.train.tokens                             # how many there are, over all shards
    source.train.read(start=10**9, length=2049)     # uint16 [2049], a view of the file where one shard holds it
    source.train.gather(starts, length=2049)        # int64 [N, 2049]

    source = open_source("s3://bucket/english", cache=ShardCache(...))     # shards are fetched when they are first read

Opening 100,000 shards takes 16 ms and 18 MB (2 cores, AVX2, 2026-11-24; tools/bench/loader.py). A source pickles, so
that one process reads the lists for all.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megacl.data.manifest import MANIFEST, Generation, Manifest, no_manifest, parse_manifest, read_manifest
from megacl.data.shard_list import SHARDS, DTypeName, ShardList, parse_shards, read_shards
from megacl.data.shards import Documents, Tokens, open_documents
from megacl.data.store import OPEN_FETCHED, RemoteFolder, ShardCache, StagedFolder, is_url
from megacl.errors import DataError

_OPEN_SHARDS = 16384
"""Shards that a process keeps mapped, over all sources: Linux allows it 65,530 maps (vm.max_map_count) in all."""


class TokenStream:
    """All documents of a split behind one another, in the order of the rows, as one sequence of tokens.

    Nothing is opened before the first read. A shard's size and header are compared with its row when it is first
    read: DataError names the file. Positions count tokens from 0 to `tokens`; outside that, ValueError.
    """

    def __init__(self, folder: Path | RemoteFolder, shards: ShardList, dtype: DTypeName) -> None:
        self.folder, self.shards, self.dtype = folder, shards, dtype
        self.documents = int(shards.numbers("documents").sum())
        self.text_bytes = int(shards.numbers("text_bytes").sum())
        lengths = shards.numbers("tokens")
        self.ends = np.cumsum(lengths)
        """Where each shard's tokens end, int64 [shards]."""
        self.begins = self.ends - lengths
        """Where each shard's tokens begin, int64 [shards]."""
        self.tokens = int(self.ends[-1]) if len(shards) else 0
        self.sizes = shards.numbers("size")
        """Bytes of each shard's file, int64 [shards]."""

    def read(self, start: int, length: int) -> Tokens:
        """Tokens [start, start + length): [length], of the shards' own type, read-only; a copy only across shards."""
        self._check(start, start, length)
        if length == 0:
            return np.empty(0, self.dtype)
        parts = list(self._parts(start, length, int(np.searchsorted(self.ends, start, side="right"))))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def gather(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + length) for each of N starts: int64 [N, length]."""
        result = np.empty((len(starts), length), np.int64)
        if result.size == 0:
            return result
        self._check(int(starts.min()), int(starts.max()), length)
        first = np.searchsorted(self.ends, starts, side="right")
        last = np.searchsorted(self.ends, starts + (length - 1), side="right")
        local = starts - self.begins[first]
        inside = first == last
        for row, shard, begin, whole in zip(
            result, first.tolist(), local.tolist(), inside.tolist(), strict=True
        ):  # one copy of `length` tokens each, widened on the way
            if whole:
                row[:] = self._open(shard)[begin : begin + length]
        for index in np.flatnonzero(~inside).tolist():
            np.concatenate(list(self._parts(int(starts[index]), length, int(first[index]))), out=result[index])
        return result

    def shards_of(self, starts: npt.NDArray[np.int64], length: int) -> list[int]:
        """The shards that hold tokens [start, start + length) for any of N starts, by their numbers, ascending."""
        edges = [np.searchsorted(self.ends, starts + offset, side="right") for offset in (0, length - 1)]
        return [int(shard) for shard in np.unique(np.concatenate(edges))]

    def _open(self, shard: int) -> Tokens:
        return (_open_shard if isinstance(self.folder, Path) else _open_fetched)(self, shard)

    def documents_of(self, shard: int) -> Documents:
        """The documents of one shard, by its number; DataError if it is damaged or cannot be opened."""
        return open_documents(self.folder, self.shards.row(shard), self.dtype)

    def _check(self, lowest: int, highest: int, length: int) -> None:
        if lowest < 0 or length < 0 or highest + length > self.tokens:
            raise ValueError(
                f"tokens [{lowest}, {highest + length}) are asked for; {self.folder} has [0, {self.tokens})"
            )

    def _parts(self, start: int, length: int, shard: int) -> Iterator[Tokens]:
        """The tokens as one piece a shard that they lie in; `shard` is the one that holds `start`."""
        while length > 0:
            begin = start - int(self.begins[shard])
            part = self._open(shard)[begin : begin + length]
            yield part
            start, length, shard = start + len(part), length - len(part), shard + 1


# One for the whole process, since the limit is the process's. Keyed by the stream itself, not by its folder's name,
# where other shards may lie by then; so a stream that was given up stays until newer shards push its own out.
@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(stream: TokenStream, shard: int) -> Tokens:
    """The tokens of one of the stream's shards, read-only; DataError if it is damaged or cannot be opened."""
    return open_documents(stream.folder, stream.shards.row(shard), stream.dtype).values


@functools.lru_cache(maxsize=OPEN_FETCHED)
def _open_fetched(stream: TokenStream, shard: int) -> Tokens:
    """`_open_shard` for shards of a store: fewer, since each is an open file, and what is open stays on the disk."""
    return open_documents(stream.folder, stream.shards.row(shard), stream.dtype).values


@dataclass(frozen=True)
class Source:
    """One generation of a data folder, ready to read."""

    name: str
    folder: Path | RemoteFolder
    generation: int
    since: int  # what this earlier generation held is left out; 0: nothing is
    fingerprint: str
    dtype: DTypeName
    tokenizer_fingerprint: str
    tokenizer_name: str
    vocab_size: int  # of the tokenizer: every token is below it
    eos_id: int
    held_out: float  # the part of the documents that is held out, by their hashes
    train: TokenStream
    validation: TokenStream
    window: int | None = None  # the order that its user asks for: data/sequences.py

    @property
    def path(self) -> str:
        """The folder as it was named, a path or a URL."""
        return self.folder.url if isinstance(self.folder, RemoteFolder) else str(self.folder)

    @property
    def cached(self) -> bool:
        """Whether its shards are read through a cache on this machine's disk."""
        return isinstance(self.folder, RemoteFolder)

    @property
    def local(self) -> Path | None:
        """The folder in this machine's file systems, staged or not; None where it lies on a store."""
        if isinstance(self.folder, StagedFolder):
            return self.folder.folder
        return self.folder if isinstance(self.folder, Path) else None

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer in the folder; a copy of it where the folder lies on a store."""
        if isinstance(self.folder, Path):
            return self.folder / self.tokenizer_name
        if isinstance(self.folder, StagedFolder):
            return self.folder.folder / self.tokenizer_name
        return self.folder.copy_tokenizer(self.tokenizer_name, self.tokenizer_fingerprint)


def open_source(
    path: str | Path, generation: int | None = None, since: int = 0, cache: ShardCache | None = None
) -> Source:
    """Opens a data folder at a generation, the last one if None, without touching a shard.

    path: a folder, or a URL of one on a store, whose shards are fetched into `cache`. since: leave out what that
    earlier generation held already. DataError if the folder, its manifest or its list of shards is missing or damaged,
    has no such generation, or none of its shards is newer than `since`; if the store cannot be read, or cache is None.
    """
    folder, manifest, shards = _read_lists(path, cache)
    state = manifest.at(generation, folder)
    shards = shards.at(state.generation)
    _check_shards(folder, manifest, state, shards)
    if since:
        shards = shards.at(state.generation, since)
        if not len(shards):
            raise DataError(
                f"{folder}: generation {state.generation} has no shard that generation {since} had not. Prepare new "
                "documents into it, or lower `since`."
            )
    return Source(
        name=manifest.source,
        folder=folder,
        generation=state.generation,
        since=since,
        fingerprint=shards.fingerprint(manifest.tokenizer.fingerprint, manifest.dtype) if since else state.fingerprint,
        dtype=manifest.dtype,
        tokenizer_fingerprint=manifest.tokenizer.fingerprint,
        tokenizer_name=manifest.tokenizer.file,
        vocab_size=manifest.tokenizer.vocab_size,
        eos_id=manifest.tokenizer.eos_id,
        held_out=manifest.validation,
        train=TokenStream(folder, shards.split("train"), manifest.dtype),
        validation=TokenStream(folder, shards.split("validation"), manifest.dtype),
    )


def _read_lists(path: str | Path, cache: ShardCache | None) -> tuple[Path | RemoteFolder, Manifest, ShardList]:
    stored: RemoteFolder
    if not is_url(path):
        folder = Path(path)
        if cache is None or not cache.stage:
            return folder, read_manifest(folder), read_shards(folder)
        stored = StagedFolder(str(path), cache)
    elif cache is None:
        raise DataError(
            f"{path}: its shards lie on a store, and there is no cache to fetch them into; set cache.path to a folder "
            "on a local disk."
        )
    else:
        stored = RemoteFolder(str(path), cache)
    content = stored.read(MANIFEST)
    if content is None:
        if isinstance(stored, StagedFolder):
            raise no_manifest(path)
        raise DataError(
            f"{stored}: {stored.why_missing()}. Upload a folder that `megacl prepare` wrote, or mend the path."
        )
    return (
        stored,
        parse_manifest(content, f"{stored}/{MANIFEST}"),
        parse_shards(stored.read(SHARDS), f"{stored}/{SHARDS}"),
    )


def _check_shards(folder: Path | RemoteFolder, manifest: Manifest, state: Generation, shards: ShardList) -> None:
    if len(shards) != state.shards:
        raise DataError(
            f"{folder}/{SHARDS}: it lists {len(shards)} shards of generation {state.generation}, but {MANIFEST} counts "
            f"{state.shards}. Restore both files from one copy, or prepare the folder again."
        )
    if shards.fingerprint(manifest.tokenizer.fingerprint, manifest.dtype) != state.fingerprint:
        raise DataError(
            f"{folder}: the list of shards is not the one that generation {state.generation} was made with: its "
            "fingerprint differs. Restore both files from one copy, or prepare the folder again."
        )
