"""The tensors of a folder that torch.distributed.checkpoint wrote, read without a process group and piece by piece.

    stored = StoredTensors(folder)
    stored.shapes["decoder.layers.mlp.linear_fc2.weight"]         # [layers, ...]: it lies stacked
    stored.read("decoder.layers.mlp.linear_fc2.weight", layer=3)  # of which only this layer's pieces are read

`.metadata` is a plain pickle: it is loaded by an unpickler that knows the classes of that format alone. Pieces lie one
behind the other in `*.distcp` files, each as torch.save wrote it.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from megacl.convert.pickled import Opaque, load
from megacl.errors import ConversionError

_CLASSES = """
    BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties
    TensorStorageMetadata _MEM_FORMAT_ENCODING
"""
_PLANS = "BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType"
"""How the ranks shared out the writing, which Megatron leaves in the metadata."""
_KNOWN: dict[str, Any] = {
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": Opaque,
    "collections.OrderedDict": dict,
    "pathlib.PosixPath": Opaque,
    "pathlib._local.PosixPath": Opaque,
    "torch.distributed.checkpoint.filesystem._StorageInfo": filesystem._StorageInfo,
    **{f"torch.distributed.checkpoint.planner.{name}": Opaque for name in _PLANS.split()},
    **{f"torch.distributed.checkpoint.metadata.{name}": getattr(metadata, name) for name in _CLASSES.split()},
}


class _Unpickler(pickle._Unpickler):
    """In Python: the one in C makes room for as many objects as a damaged number says, 12 GB and more."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (full := f"{module}.{name}") not in _KNOWN:
            raise pickle.UnpicklingError(full)
        return _KNOWN[full]


def _read_metadata(file: Path) -> metadata.Metadata:
    try:
        found = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except FileNotFoundError:
        raise ConversionError(f"{file}: no such file; the checkpoint is not whole. Copy it again.") from None
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{file}: damaged, or it names {error}, which megacl does not load: by such names a file can run anything."
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        raise ConversionError(f"{file}: cannot be read: {error}. Copy it again.") from None
    if not isinstance(found, metadata.Metadata) or not isinstance(getattr(found, "storage_data", None), dict):
        raise ConversionError(f"{file}: not the metadata of torch.distributed.checkpoint.")
    return found


class StoredTensors:
    """A folder, opened: shapes and dtypes by name. ConversionError for one that is damaged or names foreign classes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata = _read_metadata(folder / ".metadata")
        self._entries = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, metadata.TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, entry in self._entries.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in self._entries.items()}
        self.files = sorted({folder / each.relative_path for each in self._metadata.storage_data.values()})

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or what of it has the index `layer` in its first dimension."""
        shape = self.shapes[name] if layer is None else self.shapes[name][1:]
        whole = torch.empty(shape, dtype=self.dtypes[name])
        filled = 0
        for chunk in self._entries[name].chunks:
            offsets = list(chunk.offsets)
            if layer is not None:
                inside = layer - offsets.pop(0)
                if not 0 <= inside < chunk.sizes[0]:
                    continue
                piece = self._piece(name, chunk)[inside]
            else:
                piece = self._piece(name, chunk)
            place = whole[tuple(slice(at, at + size) for at, size in zip(offsets, piece.shape, strict=True))]
            place.copy_(piece)
            filled += piece.numel()
        if filled != whole.numel():
            raise ConversionError(
                f"{self._folder}: {name} is not whole: {filled} of {whole.numel()} numbers. Copy the checkpoint again."
            )
        return whole

    def _piece(self, name: str, chunk: metadata.ChunkStorageMetadata) -> Tensor:
        stored = self._metadata.storage_data.get(metadata.MetadataIndex(name, chunk.offsets))
        if stored is None or stored.transform_descriptors:
            raise ConversionError(
                f"{self._folder}: a piece of {name} is missing, or packed in a way that is not known."
            )
        file = self._folder / stored.relative_path
        if not file.resolve().is_relative_to(self._folder.resolve()) or not file.is_file():
            raise ConversionError(f"{file}: no such file; the checkpoint is not whole. Copy it again.")
        with file.open("rb") as stream:
            stream.seek(stored.offset)
            piece = load(io.BytesIO(stream.read(stored.length)), file, mapped=False)
        if not isinstance(piece, Tensor) or piece.shape != chunk.sizes:
            raise ConversionError(
                f"{file}: a piece of {name} is not as the metadata has it. Copy the checkpoint again."
            )
        return piece
