"""A data folder compared with what its manifest says, every byte of every shard: `megacl data verify DIR`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megacl.data.manifest import Manifest, read_inputs, read_manifest, read_removed
from megacl.data.shard_list import ShardList, ShardRow, read_shards
from megacl.data.shards import held_out_below, open_documents
from megacl.errors import DataError
from megacl.publish import sha256_of


def verify_source(
    path: str | Path, generation: int | None = None, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Reads every shard of a folder and returns what is wrong, a line a problem; [] if nothing is.

    generation: look at the shards of this one alone; by default at those of all generations but purged ones. Checked:
    the counts and the fingerprints of the manifest, the tokenizer's file, that the lists of inputs and of removed
    documents can be read, and of every shard the size, the header, the hash, that every token is below the vocabulary's
    size, that every document ends with EOS and that each is in the split that its hash says. progress is called with
    the bytes done and the bytes in all. DataError if there is nothing to verify: no manifest or no list of shards that
    can be read.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    every = read_shards(folder)
    states = [each for each in manifest.generations if not each.purged_by]
    if generation is not None:
        states = [manifest.at(generation, folder)]
    tokenizer = manifest.tokenizer
    problems = []
    chosen = np.zeros(len(every), np.bool_)
    for state in states:
        chosen |= every.is_at(state.generation)
        rows = every.at(state.generation)
        if rows.fingerprint(tokenizer.fingerprint, manifest.dtype) != state.fingerprint:
            problems.append(f"{folder}: the fingerprint of generation {state.generation} is not that of its shards")
        if (len(rows), rows.totals("train"), rows.totals("validation")) != (
            state.shards,
            state.train,
            state.validation,
        ):
            problems.append(f"{folder}: the counts of generation {state.generation} are not those of its shards")
    for read in (
        lambda: read_inputs(folder, len(manifest.generations)),
        lambda: read_removed(folder, manifest.generations),
    ):
        try:
            read()
        except DataError as error:
            problems.append(str(error))
    tokenizer_file = folder / tokenizer.file
    if not tokenizer_file.is_file():
        problems.append(f"{tokenizer_file}: the tokenizer's file is missing")
    elif sha256_of(tokenizer_file) != tokenizer.fingerprint:
        problems.append(f"{tokenizer_file}: it is not the tokenizer that made the shards")
    return problems + _damages(folder, every.where(chosen), manifest, progress)


def _damages(
    folder: Path, shards: ShardList, manifest: Manifest, progress: Callable[[int, int], None] | None
) -> list[str]:
    """What is wrong with some shards, a line a problem."""
    problems = []
    done, total = 0, int(shards.numbers("size").sum())
    for row in shards:
        if problem := shard_problem(folder, row, manifest):
            problems.append(problem)
        done += row.size
        if progress:
            progress(done, total)
    return problems


def shard_problem(folder: Path, row: ShardRow, manifest: Manifest) -> str | None:
    """What is wrong with a shard, every byte of it read, as a line that names its file; None if nothing is."""
    try:
        problem = _damage(folder, row, manifest)
    except DataError as error:
        return str(error)
    except OSError as error:
        problem = f"the shard cannot be read: {error.strerror}"
    return f"{folder / row.path}: {problem}" if problem else None


def _damage(folder: Path, row: ShardRow, manifest: Manifest) -> str | None:
    """What is wrong with a shard, every byte of it read, or None."""
    documents = open_documents(folder, row, manifest.dtype)
    if sha256_of(folder / row.path) != row.sha256:
        return "its hash is not the one in shards.arrow; it was changed or damaged"
    tokenizer = manifest.tokenizer
    if (highest := int(documents.values.max())) >= tokenizer.vocab_size:
        return f"it holds token {highest}, but the vocabulary has {tokenizer.vocab_size} tokens"
    if not (documents.values[documents.offsets[1:] - 1] == tokenizer.eos_id).all():
        return "a document in it does not end with EOS"
    if int(documents.text_bytes.sum()) != row.text_bytes:
        return "the lengths of its texts do not add up to the one in shards.arrow"
    held_out = documents.hashes < held_out_below(manifest.validation)
    if (held_out != (row.split == "validation")).any():
        return f"it holds a document that does not belong to the {row.split} split"
    return None
