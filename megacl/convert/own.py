"""megacl's own checkpoints, as one format among the others."""

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import xxhash

from megacl.checkpoint import (
    RunState,
    find_checkpoint,
    list_checkpoints,
    mark_of,
    open_checkpoint,
)
from megacl.checkpoint_files import Contents, file_name
from megacl.config import RunConfig
from megacl.convert.hf_tokenizer import copy_beside
from megacl.convert.mapping import SAME, Named
from megacl.convert.opened import OpenedModel, ReadOptions, same_bytes
from megacl.convert.plan import Plan, WrittenFile, in_files, tensors_of
from megacl.data.tokenizer import load_tokenizer
from megacl.errors import CheckpointError, ConversionError
from megacl.lineage import Lineage
from megacl.saving import publish_checkpoint
from megacl.tensorfile import FileFacts, facts_of

_DEFAULT_LENGTH = 2048


def is_own(path: Path) -> bool:
    """Whether a path is a checkpoint, a run with checkpoints, RUN@PHASE or RUN@STEP."""
    if not path.exists():
        return "@" in path.name and bool(list_checkpoints(Path(str(path).rpartition("@")[0])))
    return bool(list_checkpoints(path)) or ((path / "manifest.json").is_file() and (path / "state.json").is_file())


def open_own(path: Path, options: ReadOptions) -> OpenedModel:
    """Opens a checkpoint, or a run's newest good one. ConversionError where it is damaged, or there is none."""
    notes: list[str] = []
    try:
        checkpoint = open_checkpoint(find_checkpoint(str(path), notes.append, moments=False))
        mark = mark_of(checkpoint)
    except CheckpointError as error:
        raise ConversionError(str(error)) from None
    model, config = checkpoint.config.model, checkpoint.config
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else checkpoint.tokenizer()
    if config.boundaries == "attention":
        notes.append("boundaries was attention: the model saw one document at a time, which other software must see to")
    opened = OpenedModel(
        format="megacl",
        path=checkpoint.path,
        model=model,
        dtypes={},
        read=checkpoint.load_weights(),
        sources=tuple(sorted(checkpoint.path.glob("weights*.safetensors"))),
        seq_length=max([config.seq_length, *map(config.seq_length_of, config.phases)]),
        tokenizer=tokenizer.file,
        tokenizer_vocab_size=min(tokenizer.vocab_size, model.vocab_size),
        notes=tuple(notes),
        lineage=checkpoint.lineage,
        checkpoint=mark,
    )
    return opened.with_dtype(torch.float32)


def plan_own(model: OpenedModel, destination: Path, *, max_shard_size: int) -> Plan:
    """How a model becomes a checkpoint, of a run that has no phases and no data, from which others start.

    The tensors are fp32. max_shard_size: bytes of a file of tensors, if no tensor is larger. Raises ConversionError
    where the model has no tokenizer, or one with more tokens than rows.
    """
    if model.tokenizer is None:
        raise ConversionError(
            f"{model.path}: there is no tokenizer, and a checkpoint of megacl's has one; name it with --tokenizer."
        )
    tokenizer = load_tokenizer(model.tokenizer)
    if tokenizer.vocab_size > model.model.vocab_size:
        raise ConversionError(
            f"{model.path}: the vocabulary has {model.model.vocab_size} rows, and {tokenizer.file} "
            f"{tokenizer.vocab_size} tokens; give --vocab-size {tokenizer.vocab_size} or more."
        )
    config = RunConfig(
        run_dir=str(destination),
        model=model.model,
        sources={},
        phases=(),
        seq_length=model.seq_length or _DEFAULT_LENGTH,
        global_batch_size=1,
    )
    config.check()
    named = {name: Named((name,), SAME.join, SAME.split) for name in model.shapes}
    entries, make = tensors_of(model, named)
    shards = in_files(entries, max_shard_size)
    files = {file_name("weights", owner, len(shards)): shard for owner, shard in enumerate(shards)}

    def finish(folder: Path, written: Mapping[str, WrittenFile], lineage: Lineage) -> Path:
        def write(inside: Path) -> Contents:
            facts = {name: FileFacts(file.size, file.digest) for name, file in written.items()}
            for name in written:
                _link(folder / name, inside / name)
            for copy in copy_beside(tokenizer.file, inside):
                facts[copy.name] = facts_of(copy)
            places = {tensor: name for name, file in written.items() for tensor in file.tensors}
            return Contents(
                facts, places, {tensor: each for file in written.values() for tensor, each in file.tensors.items()}
            )

        checkpoint = folder.with_name("checkpoint")
        publish_checkpoint(checkpoint, write, RunState(), lineage=lineage, config=config, tokenizer=tokenizer)
        return checkpoint

    check = partial(_check, model)
    return Plan("megacl", files, make, finish, check, tensor_hashes=True, digest=xxhash.xxh3_128)


def _link(file: Path, name: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(file, name)
        return
    os.rename(file, name)  # a file system without links


def _check(model: OpenedModel, folder: Path, progress: Callable[[int], None]) -> None:
    """Whether the tensors are the model's to the last bit, and so what the hashes in the manifest were taken of."""
    read = open_checkpoint(folder).load_weights()
    for name in model.shapes:
        meant = model.read(name)
        if not same_bytes(read(name), meant):
            raise ConversionError(f"{folder}: {name} differs from what was read; the disk is not to be trusted.")
        progress(meant.nbytes)
