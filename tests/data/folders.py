"""Small raw files and the data folders that tests make of them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from megacl.data.shards import open_documents
from megacl.data.source import open_source
from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.data.tokenizer_training import train_tokenizer


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    """A .jsonl file of texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, but for the ones that are locked."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def small_tokenizer(folder: Path, texts: Sequence[str]) -> Tokenizer:
    """A tokenizer of 300 pieces that knows every byte."""
    return train_tokenizer([str(write_lines(folder / "words.jsonl", texts))], folder / "small.model", 300)


def documents_of(folder: Path, generation: int | None = None) -> dict[str, list[str]]:
    """The texts of a generation, by split, in the order of the stream."""
    source = open_source(folder, generation)
    tokenizer = load_tokenizer(source.tokenizer_file)
    return {
        split: [
            tokenizer.decode(documents.tokens(index)[:-1])
            for row in stream.shards
            for documents in [open_documents(folder, row, source.dtype)]
            for index in range(len(documents))
        ]
        for split, stream in (("train", source.train), ("validation", source.validation))
    }


def environment(root: Path) -> dict[str, str]:
    """For a process that imports this megacl."""
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
