"""A split of a data folder as a Megatron dataset: `megacl data export DIR --out PREFIX`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megacl.data.megatron import Ids, write_megatron
from megacl.data.shard_list import Split
from megacl.data.source import TokenStream, open_source
from megacl.errors import DataError


def export_megatron(
    folder: Path, prefix: Path, *, split: Split = "train", generation: int | None = None
) -> tuple[int, int]:
    """Publishes PREFIX.bin and PREFIX.idx and returns how many documents and tokens they hold.

    Each document is a sequence that ends with EOS, in the order of the stream; ids are uint16 where the folder's are,
    else int32. One shard is held at a time, and 4 bytes a document. DataError if the split is empty, or the folder or
    the disk is at fault.
    """
    source = open_source(folder, generation)
    stream = source.train if split == "train" else source.validation
    if not stream.documents:
        raise DataError(f"{folder}: generation {source.generation} has no {split} documents. Export the other split.")
    documents = write_megatron(prefix, _documents(stream), np.uint16 if source.dtype == "uint16" else np.int32)
    return documents, stream.tokens


def _documents(stream: TokenStream) -> Iterator[Ids]:
    for shard in range(len(stream.shards)):
        documents = stream.documents_of(shard)
        yield from map(documents.tokens, range(len(documents)))
