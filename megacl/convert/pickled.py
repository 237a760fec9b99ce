"""Files of torch.save, opened without running anything that stands in them.

    files = PickledFiles()
    state = files.open(Path("layer_00-model_00-model_states.pt"))      # nested dicts; tensors lie mapped in the file

`torch.load(weights_only=True)` builds tensors and plain containers alone. What training software saves beside the
weights (states of random generators, arguments, enumerations) comes back as `Opaque`, a thing of ours that holds what
it was given and does nothing; `STUBS` names what may stand for it, and a file that names anything else is refused.
"""

import argparse
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacl.errors import ConversionError

MAPPED = 1 << 28
"""Bytes that are read from mapped files before the mappings are given up: a page that was read stays in memory as long
as its file is mapped, so that reading a file to its end would look like holding all of it."""


class Opaque:
    """An object of a class that is not loaded: what it was made with, and nothing that it could do."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


_OPAQUE = """
    numpy.ndarray numpy.dtype numpy._core.multiarray._reconstruct numpy.core.multiarray._reconstruct
    numpy._core.multiarray.scalar numpy.core.multiarray.scalar numpy.dtypes.UInt32DType
    pathlib.PosixPath pathlib._local.PosixPath pathlib.PurePosixPath signal.Signals _io.BytesIO
    deepspeed.runtime.zero.config.ZeroStageEnum deepspeed.runtime.fp16.loss_scaler.LossScaler
    deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler deepspeed.utils.tensor_fragment.fragment_address
    megatron.model.enums.AttnMaskType megatron.model.enums.ModelType megatron.core.enums.ModelType
    megatron.core.transformer.enums.AttnBackend megatron.core.transformer.enums.CudaGraphScope
    megatron.core.transformer.enums.CudaGraphModule megatron.core.transformer.enums.InferenceCudaGraphScope
    megatron.core.optimizer.optimizer_config.OptimizerConfig
    megatron.core.rerun_state_machine.RerunDiagnostic megatron.core.rerun_state_machine.RerunMode
    megatron.core.rerun_state_machine.RerunState
"""
STUBS: list[Any] = [
    (argparse.Namespace, "argparse.Namespace"),
    (argparse.Namespace, "types.SimpleNamespace"),
    *((Opaque, name) for name in _OPAQUE.split()),
]
"""Names that a file may hold beside tensors and containers, with what stands for each."""


def load(source: Any, where: Path, *, mapped: bool = True, meta: bool = False) -> Any:
    """What torch.save wrote; ConversionError for a file that is damaged or that names what is not in `STUBS`.

    source: a path or an open file. where: what the error names. mapped: tensors stay in the file until they are used.
    meta: tensors have shapes and no content.
    """
    try:
        with torch.serialization.safe_globals(STUBS):
            return torch.load(source, map_location="meta" if meta else "cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _refused(where, str(error)) from None
    except Exception as error:  # a damaged pickle raises anything
        if mapped and "mmap can only be used" in str(error):  # the form of torch before 1.6
            return load(source, where, mapped=False, meta=meta)
        raise ConversionError(f"{where}: cannot be read: {_first_line(error)}. Copy it again.") from None


def _refused(where: Path, message: str) -> ConversionError:
    found = re.search(r"GLOBAL (\S+)", message) or re.search(r"(?:function|class) (\S+)", message)
    if found is None:
        return ConversionError(f"{where}: not a file of torch.save, or damaged: {message.splitlines()[0]}")
    return ConversionError(
        f"{where}: it names {found[1].strip(':,;')}, which megacl does not load: by such names a file can run "
        "anything. Where you trust it, save its weights again as tensors alone."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


class PickledFiles:
    """Files of torch.save that are opened when they are asked for, and again after much was read from them."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._read = 0

    def open(self, file: Path) -> Any:
        """The whole of what stands in a file; its tensors are views of the mapped file, and are not written to."""
        if file not in self._open:
            if not file.is_file():
                raise ConversionError(f"{file}: no such file; the checkpoint is not whole. Copy it again.")
            found = load(file, file)
            if not isinstance(found, dict):
                raise ConversionError(f"{file}: it holds a {type(found).__name__}, and no checkpoint of named tensors.")
            self._open[file] = found
        return self._open[file]

    def tensor(self, file: Path, keys: tuple[str | int, ...], *, span: slice = slice(None)) -> Tensor:
        """A copy of the tensor that stands under nested keys in a file, or of a span of its first dimension."""
        value = self.open(file)
        for key in keys:
            value = value[key]
        value = value.detach()  # DeepSpeed saves leaves of its graph
        copy: Tensor = value[span].clone() if value.ndim else value.clone()
        self._read += copy.nbytes
        if self._read > MAPPED:
            self._open.clear()
            self._read = 0
        return copy


def tensors_of(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of nested dicts, with the keys under which it stands."""
    if isinstance(tree, Tensor):
        yield keys, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors_of(value, (*keys, key))
