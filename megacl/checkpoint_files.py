"""The files of a checkpoint, to the byte: those that hold tensors, the index of these, and the manifest of all.

    contents = write_tensors(folder, 0, 2, {"head.weight": {"weight": ..., "exp_avg": ...}})   # what owner 0 of 2 has
    write_manifest(folder, [contents, ...])
    TensorFiles(folder).read("exp_avg.head.weight")

Which owner wrote a tensor matters to nobody who reads: the index names the file of each.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megacl.errors import CheckpointError
from megacl.tensorfile import FileFacts, TensorReader, TensorWriter, facts_of

FORMAT, VERSION = "megacl-checkpoint", 3
MANIFEST, INDEX = "manifest.json", "index.json"
KINDS = {"weight": "weights", "exp_avg": "optimizer", "exp_avg_sq": "optimizer", "anchor": "reptile"}
"""In which files each tensor of a parameter's state stands."""


def tensor_name(parameter: str, key: str) -> str:
    """How files and index name a tensor of a parameter's state: the weight by the parameter's own name."""
    return parameter if key == "weight" else f"{key}.{parameter}"


@dataclass(frozen=True)
class Contents:
    """What was written: files, and the tensors in them."""

    files: Mapping[str, FileFacts] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    """The file of each tensor."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Hexadecimal SHA-256 of the bytes of each weight."""

    @property
    def weights_hash(self) -> str:
        """What a lineage names weights by, whatever files they stand in (docs/formats.md)."""
        lines = sorted(f"{name} {sha256}\n" for name, sha256 in self.weights.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @staticmethod
    def together(parts: Iterable["Contents"]) -> "Contents":
        """The contents of all of them."""
        files: dict[str, FileFacts] = {}
        tensors: dict[str, str] = {}
        weights: dict[str, str] = {}
        for part in parts:
            files.update(part.files)
            tensors.update(part.tensors)
            weights.update(part.weights)
        return Contents(files, tensors, weights)


def write_tensors(
    folder: Path,
    owner: int,
    owners: int,
    state: Mapping[str, Mapping[str, Tensor]],
    goes_on: Callable[[], None] = lambda: None,
) -> Contents:
    """Writes an owner's tensors into its files, and to the disk. goes_on: called before each; may raise to end it.

    state: parameter -> key of KINDS -> fp32 tensor. Raises OSError where the disk refuses.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for parameter, tensors in state.items():
        for key, tensor in tensors.items():
            files.setdefault(KINDS[key], {})[tensor_name(parameter, key)] = tensor
    facts, weights = {}, {}
    with contextlib.ExitStack() as until_hashed:
        written = []
        for kind, content in files.items():
            name = file_name(kind, owner, owners)
            entries = {each: (content[each].dtype, tuple(content[each].shape)) for each in sorted(content)}
            # All tensors are in memory already, so weights may be hashed while moments are written.
            file = TensorWriter(folder / name, entries, hashes=kind == "weights", behind=math.inf)
            written.append(until_hashed.enter_context(file))
            for each in file.names:
                goes_on()
                file.write(each, content[each])
            facts[name] = file.close()
        for file in written:
            weights.update(file.hashes())
    places = {each: file_name(kind, owner, owners) for kind, content in files.items() for each in content}
    return Contents(facts, places, weights)


def file_name(kind: str, owner: int, owners: int) -> str:
    """The name of one of an owner's files. kind: of KINDS."""
    return f"{kind}-{owner:05d}-of-{owners:05d}.safetensors"


def write_manifest(folder: Path, parts: Iterable[Contents]) -> None:
    """Writes the index of the tensors, and the manifest: the last file of a checkpoint. Raises OSError."""
    whole = Contents.together(parts)
    index = {"weights": dict(sorted(whole.weights.items())), "tensors": dict(sorted(whole.tensors.items()))}
    files = {**whole.files, INDEX: write_text(folder / INDEX, _json(index))}
    rows = {name: {"size": facts.size, "xxh3_128": facts.digest} for name, facts in sorted(files.items())}
    write_text(folder / MANIFEST, _json({"format": FORMAT, "version": VERSION, "files": rows}))


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1) + "\n"


def write_text(path: Path, text: str) -> FileFacts:
    """Writes a file, and to the disk."""
    content = text.encode()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(len(content), xxhash.xxh3_128(content).hexdigest())


# ---------------------------------------------------------------------------------------------- reading


def read_index(folder: Path) -> Contents:
    """What a checkpoint's index says; no `files`. Raises CheckpointError where it cannot be read."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        tensors, weights = index["tensors"], index["weights"]
        texts = (*tensors.items(), *weights.items())
        if not (weights.keys() <= tensors.keys() and all(isinstance(text, str) for pair in texts for text in pair)):
            raise ValueError("it is no index of tensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from None
    return Contents({}, tensors, weights)


def hashes_of(path: Path) -> dict[str, str]:
    """The SHA-256 of each tensor of a file, which reads it all. Raises CheckpointError."""
    file = TensorReader(path)
    return {name: _sha256(file.read(name)) for name in file.entries}


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that is read when it is asked for."""

    files: "TensorFiles"
    name: str

    @property
    def shape(self) -> torch.Size:
        """Its shape. Raises CheckpointError where there is no such tensor."""
        return torch.Size(self.files.entry(self.name)[1])

    def read(self) -> Tensor:
        """All of it, as `TensorFiles.read`."""
        return self.files.read(self.name)

    def stretch(self, start: int, count: int) -> Tensor:
        """A part of it, as `TensorFiles.stretch`."""
        return self.files.stretch(self.name, start, count)


class TensorFiles:
    """The tensors of a checkpoint, by name; each file is opened when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where there is no index."""
        self._folder, self.index = folder, read_index(folder)
        self._opened: dict[str, TensorReader] = {}

    def keys_of(self, parameter: str) -> tuple[str, ...]:
        """Of KINDS, those that there are of a parameter."""
        return tuple(key for key in KINDS if tensor_name(parameter, key) in self.index.tensors)

    def entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """A tensor's dtype and shape. Raises CheckpointError where there is no such tensor."""
        return self._file_of(name).entries[name]

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU. Raises CheckpointError where there is no such tensor."""
        return self._file_of(name).read(name)

    def stretch(self, name: str, start: int, count: int) -> Tensor:
        """`count` of a tensor's elements from the start-th on, row by row, 1-D; as `read`."""
        return self._file_of(name).stretch(name, start, count)

    def hash_weights(self) -> str:
        """`Contents.weights_hash` of the weights as the files have them now, a tensor at a time."""
        return Contents(weights={name: _sha256(self.read(name)) for name in self.index.weights}).weights_hash

    def _file_of(self, name: str) -> TensorReader:
        file = self.index.tensors.get(name)
        if file is None:
            raise CheckpointError(f"{self._folder}: holds no tensor {name!r}; the model has another shape.")
        if file not in self._opened:
            self._opened[file] = TensorReader(self._folder / file)
        if name not in self._opened[file].entries:
            raise CheckpointError(f"{self._folder / file}: holds no tensor {name!r}; the index is wrong.")
        return self._opened[file]


def read_manifest(folder: Path) -> dict[str, FileFacts]:
    """What a checkpoint's manifest says of each file. Raises CheckpointError where it is missing, broken or changed."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            found = f"{manifest['format']} {manifest['version']}"
            raise CheckpointError(f"{folder}: made in format {found}, which is not known here")
        files = {name: FileFacts(facts["size"], facts["xxh3_128"]) for name, facts in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if content != _json(manifest).encode():  # one space became another, which the values do not show
        raise CheckpointError(f"{path}: its content has changed")
    return files


def damaged_files(folder: Path, *, moments: bool = True) -> list[tuple[Path, str]]:
    """Files of a checkpoint that are not as its manifest says, each with a line that says so.

    moments: look at the optimizer's too, which are two thirds of it.
    """
    try:
        files = read_manifest(folder)
    except CheckpointError as error:
        return [(folder / MANIFEST, str(error))]
    return [
        (folder / name, problem)
        for name, facts in files.items()
        if (moments or not name.startswith("optimizer-")) and (problem := _problem_of(folder / name, facts))
    ]


def _problem_of(path: Path, facts: FileFacts) -> str | None:
    try:
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != facts.size:
            return f"{path}: has {path.stat().st_size} bytes of {facts.size}"
        return None if facts_of(path) == facts else f"{path}: its content has changed (XXH3)"
    except OSError as error:  # a sector that is lost, say
        return f"{path}: cannot be read: {error.strerror}"
