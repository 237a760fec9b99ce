"""Which format a path is, by its files, and opening it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megacl.convert import deepspeed, litgpt, megatron, neox
from megacl.convert.hf import is_hf, open_hf
from megacl.convert.opened import OpenedModel, ReadOptions
from megacl.convert.own import is_own, open_own
from megacl.errors import ConversionError


@dataclass(frozen=True)
class Reader:
    """A format that can be read."""

    words: str
    """The files by which it is known, for an error that names all of them."""
    recognises: Callable[[Path], bool]
    open: Callable[[Path, ReadOptions], OpenedModel]
    takes_config: bool = False
    """Whether its weights may stand without what describes the model, which is given beside them."""


READERS: dict[str, Reader] = {
    "megacl": Reader("a run or checkpoint of megacl's", is_own, open_own),
    "hf": Reader(
        "a folder with config.json and model.safetensors, pytorch_model.bin or an index of them", is_hf, open_hf
    ),
    neox.FORMAT: Reader(neox.WORDS, neox.recognises, neox.open_neox, takes_config=True),
    megatron.FORMAT: Reader(megatron.WORDS, megatron.recognises, megatron.open_megatron),
    deepspeed.FORMAT: Reader(deepspeed.WORDS, deepspeed.recognises, deepspeed.open_deepspeed, takes_config=True),
    litgpt.FORMAT: Reader(litgpt.WORDS, litgpt.recognises, litgpt.open_litgpt, takes_config=True),
}
"""By the format's name, in the order in which they are asked: one line a format, here."""


def known_format(path: Path) -> str | None:
    """The name of the format of a file or folder; None where there is nothing there, or nothing that is known."""
    return next((name for name, reader in READERS.items() if reader.recognises(path)), None)


def detect_format(path: Path) -> str:
    """The name of the format of a file or folder.

    Raises ConversionError where there is nothing there, or nothing that is known.
    """
    if (name := known_format(path)) is not None:
        return name
    if not path.exists():
        raise ConversionError(f"{path}: no such file or folder.")
    known = "; ".join(f"{name}: {reader.words}" for name, reader in READERS.items())
    raise ConversionError(f"{path}: no model of a known format. Known are {known}.")


def open_model(path: Path, options: ReadOptions | None = None, *, format: str | None = None) -> OpenedModel:
    """Opens a model of any known format; `format` only where its files could be of several.

    Raises ConversionError where it is of none, damaged, or of an architecture that megacl does not have.
    """
    name, options = format or detect_format(path), options or ReadOptions()
    if options.config is not None and not READERS[name].takes_config:
        raise ConversionError(f"{path}: of {name}, whose files say all of it; leave out --config, {options.config}.")
    return READERS[name].open(path, options)
