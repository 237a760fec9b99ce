"""Training a SentencePiece model on raw documents; tools/train_tokenizer.py is its command line.

tokenizer = train_tokenizer(["raw/"], Path("tokenizer.model"), 32000)
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from megacl.data.documents import read_documents
from megacl.data.forms.reading import Reading
from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.errors import DataError
from megacl.publish import disk_errors, publish_bytes

_LINE_CHARACTERS = 4000
# Unigram sums its statistics a thread at a time: another number of threads would train another model.
_THREADS = 4


def train_tokenizer(
    inputs: Sequence[str],
    out: Path,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    field: str = "text",
) -> Tokenizer:
    """Trains a SentencePiece model on raw documents and publishes it at `out`, whose name must end with .model.

    The same inputs give the same bytes. Nothing is normalised and bytes stand in for characters without a piece of
    their own, so text comes back byte for byte; digits are split, so numbers are read digit by digit. Ids: 0 unknown,
    1 BOS, 2 EOS. inputs: as for prepare. SentencePiece holds all text in memory: give it a sample of up to some GB.
    DataError for what is wrong with the inputs, or a vocab_size that they cannot fill.
    """
    if out.suffix != ".model":
        raise DataError(f"{out}: the name of a SentencePiece model must end with .model.")
    lines = _TrainingLines(read_documents(inputs, Reading(field=field)))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _LINE_CHARACTERS,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.failure is not None:
            raise lines.failure from None
        reason = str(error).rpartition("] ")[2].strip() or "there is no text in the inputs"
        raise DataError(f"{out}: SentencePiece cannot train with vocab_size {vocab_size}: {reason}") from None
    with disk_errors(out, "the tokenizer"):
        out.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(out, model.getvalue(), "the tokenizer")
    return load_tokenizer(out)


class _TrainingLines:
    """Documents as the lines that SentencePiece's trainer takes, cut where they are longer than it takes.

    The trainer turns whatever its iterator raises into a RuntimeError of its own: `failure` keeps the original.
    """

    def __init__(self, documents: Iterator[str]) -> None:
        self.documents = documents
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self.documents:
                for line in document.split("\n"):
                    for start in range(0, len(line), _LINE_CHARACTERS):
                        yield line[start : start + _LINE_CHARACTERS]
        except BaseException as error:
            self.failure = error
            raise
