"""Safetensors files written one tensor at a time, hashed on their way to the disk; and read tensor by tensor.

    with TensorWriter(path, {"head.weight": (torch.float32, (1024, 64))}) as file:
        for name in file.names:
            file.write(name, load(name))
        facts = file.close()        # size and hash, once all of it is on the disk

    TensorReader(path).read("head.weight")

The format: 8 bytes with the header's length, little-endian; the header, JSON, {name: {"dtype", "shape",
"data_offsets": [first, end)}} and strings under "__metadata__"; the tensors, one behind the other, row by row. What
safetensors itself writes takes all tensors at once.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import xxhash

from megacl.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How the format names them."""
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

_ALIGNMENT = 8
_CHUNK = 2**24
"""Bytes that are hashed and written at one time."""
_BEHIND = 4
"""Chunks by which a hash may be behind the writing, where all tensors are not in memory anyway."""
_LONGEST_HEADER = 100_000_000
"""Bytes that safetensors allows."""


@dataclass(frozen=True)
class FileFacts:
    """What a manifest says of a file."""

    size: int
    """Bytes."""
    digest: str
    """XXH3 of 128 bits of its content, hexadecimal. It finds every accident, several times as fast as SHA-256; that
    somebody meant to change a file it does not show, but then the manifest would be changed too."""


def facts_of(path: Path) -> FileFacts:
    """Size and hash of a file, which is read for it. OSError."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        return FileFacts(file.tell(), digest)


class TensorWriter:
    """A safetensors file under way. It is whole once `close` has returned; until then nothing should read it."""

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        *,
        hashes: bool = False,
        digest: Callable[[], Any] = xxhash.xxh3_128,
        behind: float = _BEHIND,
    ) -> None:
        """Opens a new file and writes its header.

        entries: dtype and shape of every tensor by name. hashes: for `hashes`. digest: constructs the hash of the file
        that `close` returns. behind: chunks of 16 MiB by which a hash may be behind the writing: so long their tensors
        are held. ValueError for a dtype that the format has not here; OSError where the disk refuses,
        FileExistsError where the file is there.
        """
        self._tensor_hash = hashlib.sha256() if hashes else None
        for name, (dtype, _) in entries.items():
            if name == "__metadata__" or dtype not in DTYPES:
                raise ValueError(f"{name} in {dtype}: safetensors has no such tensor")
        # Largest elements first, so that each lies at a multiple of its size.
        order = sorted(entries, key=lambda name: -entries[name][0].itemsize)
        self._entries = {name: entries[name] for name in order}
        self._left = list(reversed(order))
        self._hash, self._size = digest(), 0
        self._tensor_hashes: dict[str, Any] = {}
        # A thread for each hash, beside the writing: all of them let go of Python's lock.
        self._hashing = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
        self._unhashed: tuple[deque[Future[None]], deque[Future[None]]] = (deque(), deque())
        self._behind = behind
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, (dtype, shape) in self._entries.items():
            first, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [first, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by `close`, or at the end of the block)
        try:
            self._put(memoryview(len(text).to_bytes(8, "little") + text))
            if self._tensor_hash is not None:
                self._tensor_hash = hashlib.sha256()
        except BaseException as error:
            self.__exit__(type(error))
            raise

    @property
    def names(self) -> list[str]:
        """The tensors in the order in which they are to be written: as given, larger elements before smaller ones."""
        return list(self._entries)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor of `names`, from any device. It must stay as it is until the file is closed
        and, where there are `hashes`, until these are known.

        ValueError where it is another one than announced.
        """
        self._check_due(name, (tensor.dtype, tuple(tensor.shape)))
        self.write_pieces(name, [tensor.detach().flatten()])

    def write_pieces(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Writes the next tensor of `names`, given as its elements row by row in any number of 1-D tensors, as `write`.

        ValueError where they are too many, too few, or of another dtype than announced.
        """
        dtype, shape = self._entries.get(name, (None, ()))
        left = math.prod(shape)
        self._check_due(name, (dtype, shape))
        for piece in pieces:
            left -= piece.numel()
            if piece.dtype != dtype or left < 0:
                raise ValueError(f"{name}: {piece.numel()} elements in {piece.dtype} are too many, or of another dtype")
            if piece.numel():
                content = piece.contiguous().cpu().view(torch.uint8).numpy().data
                self._put(content)
        if left:
            raise ValueError(f"{name}: {left} elements are missing")
        self._left.pop()
        if self._tensor_hash is not None:
            self._tensor_hashes[name], self._tensor_hash = self._tensor_hash, hashlib.sha256()

    def _check_due(self, name: str, given: tuple[torch.dtype | None, tuple[int, ...]]) -> None:
        if not self._left or name != self._left[-1] or given != self._entries[name]:
            due = f"{self._left[-1]}, {self._entries[self._left[-1]]}" if self._left else "the file's end"
            raise ValueError(f"{name}, {given}, was given; due is {due}")

    def close(self) -> FileFacts:
        """Flushes the file to the disk and closes it. ValueError where a tensor is missing."""
        if self._left:
            raise ValueError(f"{self._left[-1]} was not written")
        os.fsync(self._file.fileno())
        self._file.close()
        self._catch_up(self._unhashed[0], 0)
        return FileFacts(self._size, self._hash.hexdigest())

    def hashes(self) -> dict[str, str]:
        """Hexadecimal SHA-256 of each tensor's bytes, where that was asked for.

        It waits for them, so it is called within the `with` block.
        """
        self._catch_up(self._unhashed[1], 0)
        return {name: each.hexdigest() for name, each in self._tensor_hashes.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object = None, *error: object) -> None:
        for each in self._hashing:
            each.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():  # the first error counts
            self._file.close()

    def _put(self, content: memoryview) -> None:
        hashes = [self._hash] if self._tensor_hash is None else [self._hash, self._tensor_hash]
        for start in range(0, len(content), _CHUNK):
            chunk = content[start : start + _CHUNK]
            for each, thread, unhashed in zip(hashes, self._hashing, self._unhashed, strict=False):
                unhashed.append(thread.submit(each.update, chunk))
            self._size += len(chunk)
            left = chunk
            while left:  # a write may be cut short where the disk is nearly full; the next one says why
                left = left[self._file.write(left) :]
            for unhashed in self._unhashed:
                self._catch_up(unhashed, self._behind)

    @staticmethod
    def _catch_up(unhashed: deque[Future[None]], left: float) -> None:
        """Waits until no more than so many chunks are not hashed yet."""
        while len(unhashed) > left:
            unhashed.popleft().result()


class TensorReader:
    """A safetensors file, its header read and checked; tensors are read on demand, whole or in stretches."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where it is no such file, or is cut short."""
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, _LONGEST_HEADER)))
            header.pop("__metadata__", None)
            self._first = 8 + length
            self._tensors = {name: _entry_of(name, entry, size - self._first) for name, entry in header.items()}
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: it is no whole safetensors file ({error}).") from None

    @functools.cached_property
    def entries(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor by name."""
        return {name: (dtype, shape) for name, (dtype, shape, _) in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own. Raises CheckpointError where there is none of that name."""
        _, shape, _ = self._tensor(name)
        return self.stretch(name, 0, math.prod(shape)).reshape(shape)

    def stretch(self, name: str, start: int, count: int) -> torch.Tensor:
        """`count` elements of the tensor from the start-th on, row by row: 1-D, in memory of its own.

        Raises CheckpointError where there is no such tensor, or the file has become shorter.
        """
        dtype, shape, first = self._tensor(name)
        if not 0 <= start <= start + count <= math.prod(shape):
            raise ValueError(f"{name}: has no elements {start} to {start + count}")
        found = torch.empty(count, dtype=dtype)
        left = found.view(torch.uint8).numpy().data if count else memoryview(b"")
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._first + first + start * dtype.itemsize)
                while left:
                    if not (read := file.readinto(left)):
                        raise CheckpointError(f"{self.path}: it is cut short.")
                    left = left[read:]
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}.") from None
        return found

    def _tensor(self, name: str) -> tuple[torch.dtype, tuple[int, ...], int]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}.")
        return self._tensors[name]


def _entry_of(name: str, entry: Mapping[str, Any], end: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    """Dtype, shape and place of a tensor; ValueError where it does not lie within the first `end` bytes of data."""
    dtype, shape, (first, last) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    right = all(type(number) is int and number >= 0 for number in (*shape, first, last))
    if not right or last - first != math.prod(shape) * dtype.itemsize or last > end:
        raise ValueError(f"{name} does not lie in it")
    return dtype, shape, first
