"""Megatron's .bin and .idx files: documents that are tokens already, by the tokenizer that the data is prepared with.

The ids pass through as they are, and an EOS ends a document wherever it stands: at the end of one of the file's own
documents, as most are written, or inside, where it divides it. So the token stream is the file's own, with an EOS
where a document had none. A segment is a range of documents; a token counts as 4 bytes.
"""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

from megacl.data.forms import BadDocumentError, Document, RawFile, Segment, Vocabulary, check_unchanged
from megacl.data.forms.reading import Reading
from megacl.data.megatron import MegatronDataset, open_megatron
from megacl.errors import DataError

_TEXT_BYTES = 4
"""Bytes of text that a token is taken to stand for, since blocks are measured in text."""


def cut(file: RawFile, reading: Reading, block_bytes: int) -> Iterator[Segment]:
    """The file as segments, see megacl.data.forms. DataError if the index is damaged or of another .bin file."""
    check_unchanged(file)
    dataset = open_megatron(_prefix(file))
    start = 0
    while start < len(dataset):
        begin = dataset.begin(start)
        limit = begin + block_bytes // _TEXT_BYTES
        end = max(start + 1, bisect_right(range(len(dataset) + 1), limit, lo=start, key=dataset.begin) - 1)
        size = (dataset.begin(end) - begin) * _TEXT_BYTES
        cost = file.size * end // len(dataset) - file.size * start // len(dataset)
        yield Segment(file, start, end, size=size, cost=cost)
        start = end


def read(
    segment: Segment, reading: Reading, vocabulary: Vocabulary | None
) -> Iterator[tuple[int, Document | BadDocumentError]]:
    """The segment's documents without EOS, see megacl.data.forms. DataError for an id beyond the vocabulary."""
    name = segment.file.name
    if vocabulary is None:
        raise DataError(
            f"{name}: it holds token ids, and here texts are needed. Give the documents that it was made of."
        )
    dataset = open_megatron(_prefix(segment.file), check=False)
    _check_ids(segment, dataset, vocabulary)
    for document in range(segment.start, segment.end):
        ids = dataset.tokens(document)
        ends = np.flatnonzero(ids == vocabulary.eos_id).tolist()
        if not ends or ends[-1] != len(ids) - 1:
            ends.append(len(ids))
        begin = 0
        for end in ends:
            yield document, ids[begin:end]
            begin = end + 1


def place(segment: Segment, position: int) -> str:
    """The file's name and the number, from 1, of the document at a position."""
    return f"{segment.file.name}: document {position + 1}"


def _prefix(file: RawFile) -> str:
    return file.paths[0].removesuffix(".bin")


def _check_ids(segment: Segment, dataset: MegatronDataset, vocabulary: Vocabulary) -> None:
    ids = dataset.values[dataset.begin(segment.start) : dataset.begin(segment.end)]
    if len(ids) == 0 or 0 <= int(ids.min()) <= int(ids.max()) < vocabulary.vocab_size:
        return
    worst = int(ids.max() if ids.max() >= vocabulary.vocab_size else ids.min())
    raise DataError(
        f"{segment.file.name}: it has the token id {worst}, but the tokenizer's ids are below {vocabulary.vocab_size}, "
        "so it is not the one that made them. Give that one with --tokenizer."
    )
