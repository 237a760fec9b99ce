"""Rows for the tokens that an extended tokenizer adds to a model: where a run begins, or never.

    extension = plan_extension(old_tokenizer, tokenizer, rows_before=1024, rows=1152, new_rows="pieces", after=1)
    begun = ExtendedModel.of(checkpoint, extension)      # a checkpoint like the other, with more rows

The embedding and the output layer have a row for each token, and padding behind. A new token's row is the `mean` of
the rows of all old tokens, or the mean of the rows of the `pieces` that spelled its text before; a token that no pieces
spell (a control token, a part of a letter's bytes) has the mean of all. Padding is no token: it is in no mean. What was
there of it stays as it was where no token takes it; new padding has the mean of all, too.

With the mean of all rows in the output layer, a new token's logit is the mean of the others', so that the new rows take
at most their number's share of the probability, whatever the old logits are (Hewitt 2021, "Initializing new word
embeddings for pretrained language models"); rows of zeros can take all of it. The mean of pieces is that of Gee et al.
2022, "Fast vocabulary transfer", arXiv 2402.09977. Adam's moments of new rows are zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megacl.checkpoint import Checkpoint
from megacl.data.tokenizer import Tokenizer
from megacl.engine.base import MOMENTS
from megacl.engine.gathering import Stored
from megacl.lineage import VocabularyRecord

NewRows = Literal["mean", "pieces"]
ROWS_MULTIPLE = 128
"""What the rows of a vocabulary are rounded up to where nobody says how many: a product of them is fast on a GPU."""
_VOCABULARY = ("embed.weight", "head.weight")


@dataclass(frozen=True)
class Extension:
    """What becomes of the rows of a vocabulary."""

    record: VocabularyRecord
    pieces: tuple[tuple[int, ...], ...]
    """Of each new token, in order, the old tokens of whose rows it has the mean; none: of all."""

    def rows_of(self, old_VD: Tensor) -> Tensor:
        """The rows after the extension, of a tensor of rows [rows_before, D]."""
        record = self.record
        assert old_VD.shape[0] == record.rows_before
        mean_D = old_VD[: record.tokens_before].mean(0)
        rows_VD = torch.cat([old_VD, mean_D.expand(record.rows - record.rows_before, -1)])
        for token, pieces in enumerate(self.pieces, start=record.tokens_before):
            rows_VD[token] = old_VD[list(pieces)].mean(0) if pieces else mean_D
        return rows_VD

    def moments_of(self, old_VD: Tensor) -> Tensor:
        """Adam's moments after the extension: zero for every row that has a new weight."""
        record = self.record
        rows_VD = torch.cat([old_VD, old_VD.new_zeros(record.rows - record.rows_before, old_VD.shape[1])])
        rows_VD[record.tokens_before : record.tokens] = 0
        return rows_VD


@dataclass(frozen=True)
class ExtendedModel(Checkpoint):
    """A checkpoint whose vocabulary was extended; its lineage says so."""

    original: Checkpoint
    extension: Extension

    @classmethod
    def of(cls, original: Checkpoint, extension: Extension) -> "ExtendedModel":
        """The checkpoint, extended."""
        lineage = original.lineage
        return cls(original.path, original.state, lineage, original.config, original, extension)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        return self.original.tokenizer()

    @property
    def has_moments(self) -> bool:
        """Whether there are Adam's moments."""
        return self.original.has_moments

    def load_weights(self) -> Callable[[str], Tensor]:
        """A function from a parameter's name to its whole fp32 tensor on the CPU."""
        load = self.load_state()
        return lambda name: load(name)["weight"]

    def stored_state(self) -> Callable[[str], Mapping[str, Stored | Tensor]]:
        """What `load_state` gives: nothing of it lies in a file as it is."""
        return self.load_state()

    def load_state(self) -> Callable[[str], dict[str, Tensor]]:
        """A function from a parameter's name to its "weight", and its moments and Reptile's anchor if there are any."""
        load, extension = self.original.load_state(), self.extension

        def extended(name: str) -> dict[str, Tensor]:
            state = load(name)
            if name not in _VOCABULARY:
                return state
            return {
                key: extension.moments_of(tensor) if key in MOMENTS else extension.rows_of(tensor)
                for key, tensor in state.items()
            }

        return extended


def plan_extension(
    before: Tokenizer, tokenizer: Tokenizer, *, rows_before: int, rows: int, new_rows: NewRows, after: int
) -> Extension:
    """How a model's vocabulary is extended from one tokenizer to another, which has more tokens and extends it.

    rows_before, rows: of the embedding, padding included; rows is at least rows_before and the new tokens. after: how
    many phases precede it.
    """
    first = min(before.vocab_size, rows_before)
    pieces = tuple(_spelled(before, tokenizer, new_rows, first, rows_before))
    record = VocabularyRecord(
        after=after,
        tokenizer_before=before.fingerprint,
        tokenizer=tokenizer.fingerprint,
        tokens_before=first,
        tokens=tokenizer.vocab_size,
        rows_before=rows_before,
        rows=rows,
        new_rows=new_rows,
        from_pieces=sum(map(bool, pieces)),
    )
    return Extension(record, pieces)


def _spelled(
    before: Tokenizer, tokenizer: Tokenizer, new_rows: NewRows, first: int, rows: int
) -> list[tuple[int, ...]]:
    kinds = [kind for _, kind in before.pieces()]
    found: list[tuple[int, ...]] = []
    for token, (_, kind) in enumerate(tokenizer.pieces()[first:], start=first):
        pieces: list[int] = []
        if new_rows == "pieces" and kind == "text" and "\ufffd" not in (text := text_of(tokenizer, token)):
            pieces = before.spell(text)
        whole = pieces and all(piece < rows and kinds[piece] != "unknown" for piece in pieces)
        found.append(tuple(pieces) if whole else ())
    return found


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """The text that a token adds behind another one: with its space, which a decoder takes away in front of a text."""
    return tokenizer.decode([token, token]).removeprefix(tokenizer.decode([token]))
