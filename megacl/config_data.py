"""The schema of a run's data: tokenizer, sources, the cache of those on a store. config.py has the rest of a run."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from megacl.model.config import STRICT


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer: a SentencePiece .model file, a Hugging Face tokenizer.json, or a folder that holds one."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: str
    train: "TokenizerTraining | None" = None
    """How to make it where `path` does not exist yet."""
    new_rows: Literal["mean", "pieces"] | None = None
    """How the rows of tokens begin that the model to start from has not, whose tokenizer this one extends (`mean` of
    all old rows, or of those of the `pieces` that spelled them); null: as the model's padding is."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """A SentencePiece model with byte fallback, trained on raw documents."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    documents: tuple[str, ...]
    vocab_size: Annotated[int, Field(ge=300, description="the number of pieces, the 256 bytes included")]
    model_type: Literal["bpe", "unigram"] = "bpe"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of tokens: a folder that `megacl prepare` wrote."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: str
    """A folder, or the URL of one on a store, s3://bucket/folder, which is read through `cache`."""
    generation: Annotated[int, Field(ge=1, description="a state of the source's manifest")] | None = None
    """Null: the newest one when the run begins; from then on the run keeps it."""
    since: Annotated[int, Field(ge=0, description="an earlier generation, whose data is left out")] = 0
    """0: nothing is left out."""
    window: Annotated[int, Field(ge=1, description="shards in a window of the order")] | None = None
    """Null: a permutation of all sequences. N: shards in random order, a permutation inside every N of them."""
    documents: tuple[str, ...] | None = None
    """Raw documents to prepare first where `path` does not exist yet."""
    validation: Annotated[float, Field(ge=0, lt=1, description="the part of the documents that is held out")] = 0.01


def _check_size(value: object) -> object:
    if isinstance(value, str) and _SIZE.fullmatch(value) is None:
        raise ValueError('it must be a number of bytes, such as "500 MB", "100 GB" or "2 TB"')
    return value


_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) *(?P<unit>MB|GB|TB)")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where whole shards of sources on a store are kept: on a local disk, for all processes of a machine."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: Annotated[str, Field(min_length=1, description="a folder on a local disk")]
    """It may name variables, "$MEGACL_SCRATCH/shards", which each machine resolves for itself."""
    size: Annotated[str, BeforeValidator(_check_size)]
    """Bytes that its shards may take, "100 GB": the least recently used are deleted."""
    patience: Annotated[float, Field(gt=0, description="seconds for which a store that fails is tried again")] = 120.0

    stage: bool = False
    """Shards of sources in folders, too, are copied there and checked before they are read, once a machine."""

    @property
    def bytes(self) -> int:
        """The size in bytes; a GB has 10^9."""
        match = _SIZE.fullmatch(self.size)
        assert match is not None, "checked when the configuration was loaded"
        return int(Fraction(match["number"]) * {"MB": 10**6, "GB": 10**9, "TB": 10**12}[match["unit"]])
