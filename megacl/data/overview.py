"""What is in a data folder, in a few seconds whatever its size: `megacl data inspect DIR`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacl.data.generations import open_state
from megacl.data.manifest import Generation, InputFile, Manifest, read_inputs
from megacl.data.shard_list import ShardList
from megacl.data.shards import open_documents
from megacl.data.tokenizer import load_tokenizer

QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
_SHARDS_READ = 64
_START_TOKENS = 40


@dataclass(frozen=True)
class Lengths:
    """How long documents are, in tokens without EOS."""

    documents: int
    """How many were looked at."""
    whole: bool
    """Whether these are all; otherwise they are those of 64 shards, evenly spaced."""
    mean: float
    quantiles: tuple[int, ...]
    """At each of QUANTILES."""


@dataclass(frozen=True)
class Overview:
    """What a data folder holds at one of its generations."""

    manifest: Manifest
    state: Generation
    inputs: tuple[InputFile, ...]
    """Of all generations up to this one."""
    lengths: Lengths
    starts: tuple[str, ...]
    """How some documents begin, evenly spaced."""
    bytes_on_disk: int
    """Of this generation's shards."""
    bytes_of_others: int
    """Of shards that only other generations have."""


def look_into(folder: Path, generation: int | None = None, documents: int = 3) -> Overview:
    """Reads the lists, and the documents' lengths of at most 64 shards.

    documents: how many to show the beginnings of. DataError if the folder or a shard cannot be read.
    """
    state = open_state(folder)
    manifest = state.manifest(*state.generations)
    chosen = manifest.at(generation, folder)
    here = state.shards.is_at(chosen.generation)
    rows = state.shards.where(here)
    others = [row for row in state.shards.where(~here) if (folder / row.path).exists()]
    picked = rows.take(_spaced(len(rows), _SHARDS_READ))
    lengths = np.concatenate(
        [np.diff(open_documents(folder, row, state.dtype).offsets).astype(np.int64) - 1 for row in picked]
    )
    return Overview(
        manifest=manifest,
        state=chosen,
        inputs=read_inputs(folder, chosen.generation),
        lengths=Lengths(
            documents=len(lengths),
            whole=len(picked) == len(rows),
            mean=float(lengths.mean()),
            quantiles=tuple(np.quantile(lengths, QUANTILES, method="nearest").tolist()),
        ),
        starts=tuple(_starts(folder, manifest, rows, documents)),
        bytes_on_disk=int(rows.numbers("size").sum()),
        bytes_of_others=sum(row.size for row in others),
    )


def _spaced(count: int, wanted: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """At most `wanted` numbers below count, evenly spaced."""
    return np.unique(np.arange(wanted, dtype=np.int64) * count // wanted)


def _starts(folder: Path, manifest: Manifest, rows: ShardList, wanted: int) -> list[str]:
    tokenizer = load_tokenizer(folder / manifest.tokenizer.file)
    ends = np.cumsum(rows.numbers("documents"))
    found = []
    for place in _spaced(int(ends[-1]), wanted).tolist() if wanted else ():
        shard = int(np.searchsorted(ends, place, side="right"))
        row = rows.row(shard)
        documents = open_documents(folder, row, manifest.dtype)
        tokens = documents.tokens(place - int(ends[shard]) + row.documents)[:-1]
        found.append(tokenizer.decode(tokens[:_START_TOKENS]) + ("..." if len(tokens) > _START_TOKENS else ""))
    return found
