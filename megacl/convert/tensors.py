"""Files of tensors, read one tensor at a time: safetensors, and PyTorch's .bin where there is nothing else.

    tensors = open_safetensors([Path("model-00001-of-00002.safetensors"), ...])
    tensors.facts["model.norm.weight"]      # dtype and shape, without reading it
    tensors.read("model.norm.weight")

Safetensors are read with plain reads into memory that belongs to the tensor, not mapped: what was read is not held
against the process. A .bin is unpickled with weights_only, which takes nothing but tensors, and mapped, one file at a
time.
"""

import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacl.errors import CheckpointError, ConversionError
from megacl.tensorfile import TensorReader


@dataclass(frozen=True)
class TensorFacts:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tensors:
    """The tensors of several files under one roof."""

    facts: Mapping[str, TensorFacts]
    read: Callable[[str], Tensor]
    """A tensor of its own on the CPU, by name. ConversionError where its file is cut short or cannot be read."""


def open_safetensors(paths: Sequence[Path]) -> Tensors:
    """Reads the headers of safetensors files. ConversionError where one is damaged, or two hold one name."""
    facts: dict[str, TensorFacts] = {}
    files: dict[str, TensorReader] = {}
    for path in paths:
        with _conversion_errors():
            file = TensorReader(path)
        for name, (dtype, shape) in file.entries.items():
            if name in facts:
                raise ConversionError(f"{path}: {name} is in {files[name].path.name} too; remove what is left over.")
            facts[name], files[name] = TensorFacts(dtype, shape), file

    def read(name: str) -> Tensor:
        with _conversion_errors():
            return files[name].read(name)

    return Tensors(facts, read)


@contextlib.contextmanager
def _conversion_errors() -> Iterator[None]:
    """What is wrong with a file that is no checkpoint's."""
    try:
        yield
    except CheckpointError as error:
        raise ConversionError(f"{str(error).rstrip('.')}. Copy it again.") from None


def open_bin(paths: Sequence[Path]) -> Tensors:
    """Reads which tensors are in files that torch.save wrote.

    ConversionError where one is damaged, holds anything but tensors, or two hold one name.
    """
    facts: dict[str, TensorFacts] = {}
    places: dict[str, Path] = {}
    open_file: dict[Path, Mapping[str, Tensor]] = {}

    def load(path: Path) -> Mapping[str, Tensor]:
        if path not in open_file:
            open_file.clear()
            open_file[path] = load_bin(path)
        return open_file[path]

    for path in paths:
        for name, tensor in load(path).items():
            if name in facts:
                raise ConversionError(f"{path}: {name} is in {places[name].name} too; remove what is left over.")
            facts[name], places[name] = TensorFacts(tensor.dtype, tuple(tensor.shape)), path
    return Tensors(facts, lambda name: load(places[name])[name].clone(memory_format=torch.contiguous_format))


def load_bin(path: Path) -> Mapping[str, Tensor]:
    """The tensors of one file that torch.save wrote as a flat dict, mapped where its form allows it."""
    try:
        try:
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # from before torch 1.6, which is no zip file
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}.") from None
    except pickle.UnpicklingError as error:
        what = str(error).partition("Unsupported global: GLOBAL ")[2].split(" ", 1)[0]
        raise ConversionError(
            f"{path}: it holds {what or 'something'} beside tensors, and nothing but tensors is unpickled here."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ConversionError(f"{path}: not a file of torch.save, or damaged ({reason}). Copy it again.") from None
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise ConversionError(f"{path}: it holds something beside tensors by name.")
    return tree
