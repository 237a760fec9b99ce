"""Tensors that lie in parts, one on each rank of a tensor-parallel group, and models that are made of them.

    weight = Whole((part_of_rank_0, part_of_rank_1), columns)     # nothing is read yet
    weight.shape, weight.dtype, weight.read()                     # one whole tensor

`assemble` makes an `OpenedModel` of such tensors and a table of names (mapping.py), checked against each other: every
tensor that the model needs is there with its shape, and there is none that the model has no place for.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacl.convert.mapping import Rule, expand, foreign_shapes
from megacl.convert.opened import OpenedModel, ReadOptions, known_tokenizer
from megacl.errors import ConversionError
from megacl.model.config import ModelConfig

Merge = Callable[[Sequence[Tensor]], Tensor]
"""The parts of all ranks, in order, to the whole; works on "meta" tensors too."""


def rows(parts: Sequence[Tensor]) -> Tensor:
    """Each rank has some rows: of the vocabulary, of heads, of the MLP's width."""
    return torch.cat(tuple(parts)) if len(parts) > 1 else parts[0]


def columns(parts: Sequence[Tensor]) -> Tensor:
    """Each rank has some columns: the inputs of a row-parallel layer."""
    return torch.cat(tuple(parts), dim=1) if len(parts) > 1 else parts[0]


def sections(*shares: int) -> Merge:
    """Each rank has some rows of every section, one section behind the other; shares: the sections' relative sizes.

    (1, 1) is gate and up of a gated MLP, (n, g, g) a block of queries, keys and values.
    """

    def merge(parts: Sequence[Tensor]) -> Tensor:
        unit, rest = divmod(parts[0].shape[0], sum(shares))
        if rest:
            raise ValueError(f"{parts[0].shape[0]} rows do not divide into sections of {shares}")
        cut = [torch.split(part, [unit * share for share in shares]) for part in parts]
        return torch.cat([piece[index] for index in range(len(shares)) for piece in cut])

    return merge if len(shares) > 1 else rows


def summed(parts: Sequence[Tensor]) -> Tensor:
    """Each rank adds its own to the sum of all ranks; added in fp32, in the parts' dtype."""
    return torch.stack([part.float() for part in parts]).sum(0).to(parts[0].dtype) if len(parts) > 1 else parts[0]


def replicated(parts: Sequence[Tensor]) -> Tensor:
    """Each rank has the whole: the first's; their mean, in fp32, where they have drifted apart."""
    if all(part.is_meta or torch.equal(part, parts[0]) for part in parts[1:]):
        return parts[0]
    return torch.stack([part.float() for part in parts]).mean(0).to(parts[0].dtype)


@dataclass(frozen=True)
class Part:
    """A tensor that can be read: a shape, a dtype and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Whole:
    """A tensor that lies in parts."""

    parts: tuple[Part, ...]
    merge: Merge

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.merge([part.meta() for part in self.parts]).shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def read(self) -> Tensor:
        return self.merge([part.read() for part in self.parts])

    def drifted(self) -> bool:
        """Whether ranks that should have the same do not."""
        if self.merge is not replicated or len(self.parts) == 1:
            return False
        first = self.parts[0].read()
        return any(not torch.equal(part.read(), first) for part in self.parts[1:])


Tensors = Mapping[str, Whole | Part]
"""By a format's own names."""


def assemble(
    *,
    format: str,
    path: Path,
    model: ModelConfig,
    table: Mapping[str, Rule],
    tensors: Tensors,
    sources: Sequence[Path],
    options: ReadOptions,
    first_layer: int = 0,
    ignored: str = r"$^",
    notes: Sequence[str] = (),
    seq_length: int | None = None,
) -> OpenedModel:
    """The model, when its tensors are those that it needs.

    first_layer: the number that the format gives to the first layer. ignored: a pattern of names that carry nothing.
    Raises ConversionError for a tensor that is missing, of another shape, or that nothing takes.
    """
    _check_config(path, model)
    _check_length(path, seq_length)
    named = expand(table, model, first_layer=first_layer)
    expected = foreign_shapes(named, model)
    for name, shape in expected.items():
        if name not in tensors:
            raise ConversionError(f"{path}: {name} is missing, which a model of its configuration has.")
        _check_shape(path, name, tensors[name], shape)
    left = [name for name in tensors if name not in expected and not re.search(ignored, name)]
    if left:
        some = ", ".join(sorted(left)[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise ConversionError(f"{path}: it holds tensors that megacl's model has no place for: {some}.")
    tokenizer, tokens = known_tokenizer(options, path if path.is_dir() else path.parent, rows=model.vocab_size)
    drifted = [name for name in expected if isinstance(whole := tensors[name], Whole) and whole.drifted()]
    notes = (*notes, *_drift(drifted), *_padding(model, tokens))

    def read(name: str) -> Tensor:
        rule = named[name]
        return rule.join([tensors[theirs].read() for theirs in rule.theirs], model).contiguous()

    return OpenedModel(
        format=format,
        path=path,
        model=model,
        dtypes={
            name: functools.reduce(torch.promote_types, [tensors[theirs].dtype for theirs in rule.theirs])
            for name, rule in named.items()
        },
        read=read,
        sources=tuple(sources),
        seq_length=seq_length,
        tokenizer=tokenizer,
        tokenizer_vocab_size=tokens,
        notes=notes,
    )


def _check_config(path: Path, model: ModelConfig) -> None:
    if problem := model.problem():
        raise ConversionError(f"{path}: its model is none that megacl has: {problem}.")


def _check_length(path: Path, length: int | None) -> None:
    if length is not None and (type(length) is not int or length < 1):
        raise ConversionError(f"{path}: its longest sequence is {length!r}; its settings must have a number there.")


def _check_shape(path: Path, name: str, tensor: Whole | Part, shape: tuple[int, ...]) -> None:
    try:
        found = tensor.shape
    except (ValueError, RuntimeError) as error:
        raise ConversionError(f"{path}: the parts of {name} do not fit together: {error}.") from None
    if found != shape:
        raise ConversionError(
            f"{path}: {name} is {list(found)}, and a model of its configuration has {list(shape)} there."
        )


def _drift(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    what = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return [f"the ranks' copies of {what} differ, which should be the same; their mean is taken"]


def _padding(model: ModelConfig, tokens: int | None) -> list[str]:
    if tokens is not None:
        return []
    return [
        f"how many of the embedding's {model.vocab_size} rows are tokens is not known, so that all are kept; "
        "--tokenizer says it, or --vocab-size"
    ]


@contextlib.contextmanager
def settings_of(path: Path) -> Iterator[None]:
    """A block that makes a `ModelConfig` of a format's settings, which may be missing or no numbers."""
    try:
        yield
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{path}: its settings describe no model: {type(error).__name__}: {error}.") from None


def refuse(path: Path, settings: Mapping[str, Any], allowed: Mapping[str, Sequence[Any]]) -> None:
    """Raises ConversionError for the first setting that has a value which megacl's model cannot express.

    allowed: by a setting's name, the values that change nothing; one that is absent changes nothing either.
    """
    for name, values in allowed.items():
        if name in settings and settings[name] not in values:
            raise ConversionError(f"{path}: {name} is {settings[name]!r}; megacl's model cannot express that.")
