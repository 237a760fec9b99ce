"""A model in any format, opened: its shape read, its tensors by megacl's names on demand, one at a time.

model = open_model(Path("pythia-70m"))        # detect.py
model.model, model.notes                      # a ModelConfig; what was dropped, and why
model.read("layers.0.attention.qkv.weight")   # the whole tensor, on the CPU, in the dtype that it was stored in
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megacl.configfile import checked
from megacl.convert.layouts import fit_rows
from megacl.convert.mapping import parameter_shapes
from megacl.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, load_tokenizer
from megacl.errors import ConfigError, ConversionError
from megacl.lineage import CheckpointMark, Lineage
from megacl.model.config import ModelConfig
from megacl.publish import sha256_of


@dataclass(frozen=True)
class ReadOptions:
    """What a user may say of a source that its files do not."""

    tokenizer: Path | None = None
    """The model's tokenizer, where it does not stand beside the weights."""
    config: Path | None = None
    """A file that describes the model, where it does not stand beside the weights (gpt-neox's YAML)."""
    vocab_size: int | None = None
    """How many rows of the embedding are tokens, where the format has padding and does not say."""


@dataclass(frozen=True)
class OpenedModel:
    """A model that can be read. Opening it has read no weights; what cannot be read here was refused by its name."""

    format: str
    path: Path
    model: ModelConfig
    """vocab_size is the number of rows that the tensors have, padding included."""
    dtypes: Mapping[str, torch.dtype]
    """By megacl's names: what `read` gives."""
    read: Callable[[str], Tensor]
    """A parameter's whole tensor on the CPU; ConversionError where the file is damaged."""
    sources: tuple[Path, ...]
    """The files that hold the weights and what they mean."""
    seq_length: int | None = None
    """The longest sequence that it was trained with, where that is known."""
    tokenizer: Path | None = None
    """A tokenizer's file, as `data.tokenizer.load_tokenizer` takes it."""
    tokenizer_vocab_size: int | None = None
    """Rows of the embedding that are tokens; the rest is padding. None: not known."""
    notes: tuple[str, ...] = ()
    """What was left out of the model, and why, a line each."""
    lineage: Lineage | None = None
    """What the model has seen, where that travelled with it."""
    checkpoint: CheckpointMark | None = None
    """Where it is a checkpoint of megacl's."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by megacl's name, in the model's order."""
        return parameter_shapes(self.model)

    def with_dtype(self, dtype: torch.dtype) -> "OpenedModel":
        """The same, where every tensor is stored in one dtype."""
        return replace(self, dtypes=dict.fromkeys(self.shapes, dtype))

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 of each of `sources`, by its name relative to `path`; reads them all.

        ConversionError where one cannot be read.
        """
        base = self.path if self.path.is_dir() else self.path.parent
        try:
            return {
                str(file.relative_to(base) if file.is_relative_to(base) else file.name): sha256_of(file)
                for file in self.sources
            }
        except OSError as error:
            raise ConversionError(f"{error.filename}: cannot be read: {error.strerror}.") from None


def typed(model: ModelConfig) -> ModelConfig:
    """A model made of another software's settings; ValueError where one is of another type, or beyond its range."""
    try:
        return checked(asdict(model), ModelConfig)
    except ConfigError as error:
        raise ValueError(str(error).rstrip(".")) from None


def known_tokenizer(
    options: ReadOptions, folder: Path, *, rows: int, lineage: Lineage | None = None
) -> tuple[Path | None, int | None]:
    """The tokenizer's file that the user names, else the one in a model's folder; and how many rows are tokens.

    Where a folder has both kinds, it is the one that the model's last phase was trained with, else tokenizer.json. The
    number is the tokenizer's, else the one that the user gives. Some tokenizers have more tokens than the model has
    rows: then all rows are tokens. Raises DataError where the tokenizer cannot be read.
    """
    file = options.tokenizer
    if file is None:
        beside = [folder / name for name in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE) if (folder / name).is_file()]
        if len(beside) > 1 and lineage is not None and lineage.phases:
            trained = lineage.phases[-1].tokenizer
            beside.sort(key=lambda each: not load_tokenizer(each).matches(trained))
        file = beside[0] if beside else None
    tokens = options.vocab_size if file is None else load_tokenizer(file).vocab_size
    return file, None if tokens is None else min(tokens, rows)


def refitted(model: OpenedModel, *, vocab_size: int | None, dtype: torch.dtype | None) -> OpenedModel:
    """The model with another number of rows in its vocabulary, or with all tensors in another dtype.

    vocab_size: fewer rows are the first ones, more have zeros behind. Raises ConversionError where fewer are asked for
    than are tokens; its `read` raises it where a number does not fit into the dtype.
    """
    rows = model.model.vocab_size
    tokens, notes = model.tokenizer_vocab_size, list(model.notes)
    if vocab_size is not None and vocab_size < (tokens or 0):
        raise ConversionError(
            f"--vocab-size is {vocab_size}, and the tokenizer has {tokens} tokens, each of which needs its row."
        )
    if vocab_size is not None and vocab_size < rows:
        notes.append(f"left out rows {vocab_size} to {rows - 1} of the vocabulary")
    if vocab_size is not None and vocab_size > rows:
        notes.append(f"added rows {rows} to {vocab_size - 1} of zeros to the vocabulary, whose logits are 0")

    def read(name: str) -> Tensor:
        tensor = model.read(name)
        if vocab_size is not None and name in ("embed.weight", "head.weight"):
            tensor = fit_rows(tensor, vocab_size)
        if dtype is None or tensor.dtype == dtype:
            return tensor
        cast = tensor.to(dtype)
        narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
        if narrower and bool(tensor.isfinite().all()) and not bool(cast.isfinite().all()):
            raise ConversionError(f"{model.path}: {name} reaches {tensor.abs().max():.4g}, beyond what {dtype} holds.")
        return cast

    return replace(
        model,
        model=replace(model.model, vocab_size=vocab_size or rows),
        dtypes={name: dtype or each for name, each in model.dtypes.items()},
        read=read,
        notes=tuple(notes),
    )


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaN included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return not one.numel() or torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (one, other)))
