"""A model as a folder that transformers loads with from_pretrained: what is written, decided before."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megacl.convert.hf import CONFIG, GENERATION_CONFIG, LINEAGE, SAFETENSORS, SAFETENSORS_INDEX, open_hf, table_of
from megacl.convert.hf_config import Architecture, choose_architecture, config_tree, resolved
from megacl.convert.hf_tokenizer import NO_TOKENIZER, tokenizer_files
from megacl.convert.mapping import expand
from megacl.convert.opened import OpenedModel, ReadOptions, same_bytes
from megacl.convert.plan import Plan, WrittenFile, bytes_of, in_files, tensors_of
from megacl.errors import ConversionError
from megacl.lineage import Lineage

_DEFAULT_LENGTH = 2048
"""max_position_embeddings of a model of which nobody knows how long its sequences were."""


def plan_hf(model: OpenedModel, *, architecture: Architecture | None, max_shard_size: int) -> Plan:
    """How a model is written. max_shard_size: bytes of a file of tensors, if no tensor is larger.

    Raises ConversionError naming the option that no architecture has, or not the one that is asked for, and where the
    tensors have a dtype that the format's configuration cannot name.
    """
    family = choose_architecture(model.model, architecture)
    named = expand(table_of(family), model.model)
    entries, make = tensors_of(model, named)
    shards = in_files(entries, max_shard_size)
    if len(shards) == 1:
        files = {SAFETENSORS: shards[0]}
    else:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        files = dict(zip(names, shards, strict=True))
    tokenizer = NO_TOKENIZER if model.tokenizer is None else tokenizer_files(model)

    def finish(folder: Path, written: Mapping[str, WrittenFile], lineage: Lineage) -> Path:
        for name, content in tokenizer.files.items():
            (folder / name).write_bytes(content)
        tree = config_tree(
            model.model,
            family,
            seq_length=model.seq_length or _DEFAULT_LENGTH,
            dtype=str(model.dtypes["embed.weight"]).removeprefix("torch."),
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_id,
        )
        _write_json(folder / CONFIG, tree)
        _write_json(folder / GENERATION_CONFIG, tokenizer.generation)
        if len(files) > 1:
            sizes = {"total_size": sum(map(bytes_of, files.values()))}
            weight_map = {tensor: file for file, each in files.items() for tensor in each}
            _write_json(folder / SAFETENSORS_INDEX, {"metadata": sizes, "weight_map": weight_map})
        (folder / LINEAGE).write_text(lineage.dump(), encoding="utf-8")
        return folder

    return Plan("hf", files, make, finish, partial(_check, model), tokenizer.notes)


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(model: OpenedModel, folder: Path, progress: Callable[[int], None]) -> None:
    """Whether what was written, read as anybody's, is the model."""
    again = open_hf(folder, ReadOptions())
    if resolved(again.model) != resolved(model.model):
        raise ConversionError(f"{folder}: config.json came out as another model: {again.model}, of {model.model}.")
    for name in model.shapes:
        written, meant = again.read(name), model.read(name)
        if not same_bytes(written, meant):
            raise ConversionError(f"{folder}: {name} differs from what was read; the disk is not to be trusted.")
        progress(meant.nbytes)
