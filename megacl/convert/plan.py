"""What is to be written, decided before anything is: which tensors stand in which file."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacl.convert.mapping import Named
from megacl.convert.opened import OpenedModel
from megacl.lineage import Lineage

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The tensors of a file, as `tensorfile.TensorWriter` takes them."""


@dataclass(frozen=True)
class WrittenFile:
    """A file of tensors that is on the disk."""

    size: int
    digest: str
    """Hexadecimal hash of its content, by the plan's `digest`."""
    tensors: Mapping[str, str]
    """SHA-256 of each tensor's bytes, where the plan asks for them."""


@dataclass(frozen=True)
class Plan:
    """A model in another format, not written yet. Whatever could not be expressed was refused when it was made."""

    format: str
    files: Mapping[str, Entries]
    """The files of tensors, in the order in which they are written."""
    make: Callable[[str], Tensor]
    """A tensor of the files, by its name there."""
    finish: Callable[[Path, Mapping[str, WrittenFile], Lineage], Path]
    """Writes what stands beside the tensors, given their folder, their files by name and the model's lineage.

    Returns the folder that is to be published: that one, or one beside it.
    """
    check: Callable[[Path, Callable[[int], None]], None]
    """Reads the folder again and compares every tensor with the model's, telling how many bytes it has compared.
    ConversionError where one differs."""
    notes: tuple[str, ...] = ()
    """What is lost on the way, and why, beside the model's own notes."""
    tensor_hashes: bool = False
    """Whether `finish` wants the SHA-256 of each tensor."""
    digest: Callable[[], Any] = hashlib.sha256
    """Constructs the hash of a file of tensors."""


def tensors_of(model: OpenedModel, named: Mapping[str, Named]) -> tuple[Entries, Callable[[str], Tensor]]:
    """Every tensor of another format with its dtype and shape, in the model's order, and what makes it.

    A tensor of ours that becomes several is read once where they are made one after the other.
    """
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    origin: dict[str, tuple[str, int]] = {}
    for ours, shape in model.shapes.items():
        parts = named[ours].split(torch.empty(shape, device="meta"), model.model)
        for index, (theirs, part) in enumerate(zip(named[ours].theirs, parts, strict=True)):
            entries[theirs] = (model.dtypes[ours], tuple(part.shape))
            origin[theirs] = (ours, index)
    last: dict[str, tuple[Tensor, ...]] = {}

    def make(name: str) -> Tensor:
        ours, index = origin[name]
        if ours not in last:
            last.clear()
            last[ours] = tuple(named[ours].split(model.read(ours), model.model))
        parts = last[ours]
        if index == len(parts) - 1:
            last.clear()  # nobody comes back for it, and it may be large
        return parts[index]

    return entries, make


def in_files(entries: Entries, max_size: int) -> list[Entries]:
    """The tensors in their order, in as many files as it takes for none to exceed max_size bytes.

    A tensor larger than that has a file to itself.
    """
    files: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in entries.items():
        own = dtype.itemsize * torch.Size(shape).numel()
        if files[-1] and size + own > max_size:
            files.append({})
            size = 0
        files[-1][name] = (dtype, shape)
        size += own
    return list(files)


def bytes_of(entries: Entries) -> int:
    """The bytes of the tensors of a file."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in entries.values())
