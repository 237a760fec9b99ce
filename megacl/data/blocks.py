"""Blocks of raw documents -> shards in a work folder, on several processes, each block once.

A block leaves in the work folder at most one train and one validation shard and then its result file, KEY.json, each
published by rename. The key is a hash of the content of the block's files, its place in them and all that decides what
becomes of it, so a later call finds what an interrupted one has done and does the rest, whatever the files' names and
dates; mending one bad file costs that file alone.

A worker holds one block as text and tokens: at most 0.5 GB, or 0.1 GB and 14 bytes for each byte of its longest
document if that is more, whatever the inputs' size (measured: 170 to 260 MB for prose, 370 MB where every byte becomes
a token, 460 MB for millions of documents of a few words, 1.0 and 1.9 GB for JSON lines of 72 and 158 MB).
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from megacl.data.documents import Block, read_segment
from megacl.data.forms import Document
from megacl.data.forms.reading import Reading
from megacl.data.manifest import InputFile
from megacl.data.shard_list import ShardRow, Split
from megacl.data.shards import Tokens, hash_of, held_out_below, join_documents, token_dtype, write_shard
from megacl.data.tokenizer import load_tokenizer
from megacl.data.workers import run_on_workers
from megacl.errors import DataError
from megacl.publish import publish_text

_BATCH_CHARACTERS = 2**22


@dataclass(frozen=True)
class Recipe:
    """What a block becomes is a function of its lines and this; skip_bad only decides whether it becomes anything."""

    tokenizer_file: Path
    tokenizer_fingerprint: str
    validation: float
    reading: Reading
    skip_bad: bool

    def key(self, block: Block, contents: Mapping[str, str]) -> str:
        """The name of a block's files in the work folder; contents: the SHA-256 of each input file, by its name."""
        settings = [self.tokenizer_fingerprint, self.validation, self.reading.settings]
        segments = [
            [contents[segment.file.name], segment.file.form, segment.file.compression, segment.start, segment.end]
            for segment in block
        ]
        return hashlib.sha256(json.dumps([settings, segments]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Done:
    """What became of a block: its shards in the work folder, and counts."""

    rows: tuple[ShardRow, ...]
    bad_lines: int
    empty_documents: int
    cost: int  # bytes of input on disk


_DONE = TypeAdapter(Done)


def prepare_blocks(
    blocks: Iterator[Block],
    inputs: Sequence[InputFile],
    recipe: Recipe,
    work: Path,
    workers: int,
    progress: Callable[[int], None] | None,
) -> list[Done]:
    """What became of every block, in order: found in the work folder, or done now.

    inputs: the files that the blocks were cut from. progress is called with the bytes of input done. Raises what
    read_segment, write_shard and run_on_workers raise.
    """
    contents = {each.name: each.sha256 for each in inputs}
    keys: list[str] = []
    done: dict[str, Done] = {}
    found_cost = 0

    def undone() -> Iterator[tuple[str, Block]]:
        nonlocal found_cost
        for block in blocks:
            keys.append(recipe.key(block, contents))
            found = _read_done(work, keys[-1])
            if found and (recipe.skip_bad or not found.bad_lines):
                done[keys[-1]] = found
                found_cost += found.cost
            else:
                yield keys[-1], block

    made_cost = 0
    with contextlib.closing(run_on_workers(partial(_BlockWriter, recipe, work), undone(), workers)) as results:
        for key, result in results:
            done[key] = result
            made_cost += result.cost
            if progress:
                progress(found_cost + made_cost)
    return [done[key] for key in keys]


@dataclass
class _Part:
    """The documents of a block that are of one split."""

    tokens: list[Tokens] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)


class _BlockWriter:
    """Turns a block into shards in the work folder; one in every worker."""

    def __init__(self, recipe: Recipe, work: Path) -> None:
        self.recipe, self.work = recipe, work
        self.tokenizer = load_tokenizer(recipe.tokenizer_file)
        if self.tokenizer.fingerprint != recipe.tokenizer_fingerprint:
            raise DataError(f"{recipe.tokenizer_file}: the tokenizer changed meanwhile. Run the same command again.")
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.threshold = held_out_below(recipe.validation)

    def __call__(self, task: tuple[str, Block]) -> tuple[str, Done]:
        key, block = task
        parts: dict[Split, _Part] = {"train": _Part(), "validation": _Part()}
        bad = empty = 0
        texts: list[str] = []
        characters = 0

        def add(text: str, ids: npt.NDArray[Any]) -> None:
            raw = text.encode()
            code = hash_of(raw)
            part = parts["validation" if code < self.threshold else "train"]
            tokens = np.empty(len(ids) + 1, self.dtype)
            tokens[:-1], tokens[-1] = ids, self.tokenizer.eos_id
            part.tokens.append(tokens)
            part.text_bytes.append(len(raw))
            part.hashes.append(code)

        def encode() -> None:
            encoded = self.tokenizer.encode(texts, control=self.recipe.reading.control)
            for text, ids in zip(texts, encoded, strict=True):
                add(text, ids)
            texts.clear()

        for document in self._documents(block):
            if document is None or len(document) == 0:
                bad, empty = bad + (document is None), empty + (document is not None)
            elif isinstance(document, str):
                texts.append(document)
                characters += len(document)
                if characters >= _BATCH_CHARACTERS:
                    encode()
                    characters = 0
            else:  # token ids already: what they say decides as the text of other documents does
                encode()
                add(self.tokenizer.decode(document), document)
        encode()

        rows = tuple(
            write_shard(
                self.work / f"{key}-{split}.arrow",
                join_documents(part.tokens, self.dtype, text_bytes=part.text_bytes, hashes=part.hashes),
                split=split,
            )
            for split, part in parts.items()
            if part.tokens
        )
        result = Done(rows, bad, empty, cost=sum(segment.cost for segment in block))
        publish_text(self.work / f"{key}.json", str(_DONE.dump_json(result), "utf-8"), "the result of a block")
        return key, result

    def _documents(self, block: Block) -> Iterator[Document | None]:
        for segment in block:
            yield from read_segment(segment, self.recipe.reading, self.recipe.skip_bad, self.tokenizer)


def _read_done(work: Path, key: str) -> Done | None:
    """What became of a block earlier, if all of it still lies in the work folder."""
    try:
        found = _DONE.validate_json((work / f"{key}.json").read_bytes())
        complete = all((work / row.path).stat().st_size == row.size for row in found.rows)
    except FileNotFoundError:
        return None
    return found if complete else None
