"""Models in the files of Hugging Face's transformers: a folder with config.json and safetensors or .bin files.

model = open_hf(Path("pythia-70m"), ReadOptions())
plan = plan_hf(model, architecture=None, max_shard_size=5 * 10**9)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from megacl.convert.hf_config import FAMILIES, HuggingFaceConfig, read_config, read_json
from megacl.convert.mapping import (
    GATE_UP_APART,
    QKV_APART,
    QKV_PER_HEAD,
    Named,
    Rule,
    expand,
    foreign_shapes,
)
from megacl.convert.opened import OpenedModel, ReadOptions, known_tokenizer
from megacl.convert.tensors import TensorFacts, Tensors, open_bin, open_safetensors
from megacl.errors import CheckpointError, ConversionError
from megacl.lineage import Lineage, load_lineage

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
LINEAGE = "megacl-lineage.json"
"""Beside the files of a model that megacl wrote: what it has seen."""
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHOWN = 3
"""Names in an error."""

_NEOX_LAYER = "gpt_neox.layers.{i}."
NEOX_TABLE = {
    "embed": Rule(("gpt_neox.embed_in.{part}",)),
    "layers.attention_norm": Rule((_NEOX_LAYER + "input_layernorm.{part}",)),
    "layers.attention.qkv": Rule((_NEOX_LAYER + "attention.query_key_value.{part}",), QKV_PER_HEAD),
    "layers.attention.out": Rule((_NEOX_LAYER + "attention.dense.{part}",)),
    "layers.mlp_norm": Rule((_NEOX_LAYER + "post_attention_layernorm.{part}",)),
    "layers.mlp.up": Rule((_NEOX_LAYER + "mlp.dense_h_to_4h.{part}",)),
    "layers.mlp.down": Rule((_NEOX_LAYER + "mlp.dense_4h_to_h.{part}",)),
    "final_norm": Rule(("gpt_neox.final_layer_norm.{part}",)),
    "head": Rule(("embed_out.{part}",)),
}
_LLAMA_LAYER = "model.layers.{i}."
LLAMA_TABLE = {
    "embed": Rule(("model.embed_tokens.{part}",)),
    "layers.attention_norm": Rule((_LLAMA_LAYER + "input_layernorm.{part}",)),
    "layers.attention.qkv": Rule(
        tuple(f"{_LLAMA_LAYER}self_attn.{each}_proj.{{part}}" for each in ("q", "k", "v")), QKV_APART
    ),
    "layers.attention.q_norm": Rule((_LLAMA_LAYER + "self_attn.q_norm.{part}",)),
    "layers.attention.k_norm": Rule((_LLAMA_LAYER + "self_attn.k_norm.{part}",)),
    "layers.attention.out": Rule((_LLAMA_LAYER + "self_attn.o_proj.{part}",)),
    "layers.mlp_norm": Rule((_LLAMA_LAYER + "post_attention_layernorm.{part}",)),
    "layers.mlp.gate_up": Rule(
        (_LLAMA_LAYER + "mlp.gate_proj.{part}", _LLAMA_LAYER + "mlp.up_proj.{part}"), GATE_UP_APART
    ),
    "layers.mlp.down": Rule((_LLAMA_LAYER + "mlp.down_proj.{part}",)),
    "final_norm": Rule(("model.norm.{part}",)),
    "head": Rule(("lm_head.{part}",)),
}
_DROPPED = re.compile(
    r".*\.(attention\.(bias|masked_bias)|(attention|self_attn)\.rotary_emb\.inv_freq|rotary_emb\.inv_freq)"
)
"""Buffers that older files hold beside the weights; they follow from the configuration."""


def table_of(architecture: str) -> Mapping[str, Rule]:
    """The names of a family's tensors."""
    return NEOX_TABLE if architecture == "gpt_neox" else LLAMA_TABLE


def is_hf(path: Path) -> bool:
    """Whether a folder holds a model of transformers' own names."""
    return (path / CONFIG).is_file() and any(
        (path / name).is_file() for name in (SAFETENSORS, SAFETENSORS_INDEX, _BIN, _BIN_INDEX)
    )


def open_hf(path: Path, options: ReadOptions) -> OpenedModel:
    """Opens a folder; reads config.json and the headers of the files of tensors.

    Raises ConversionError where a file is missing or damaged, where tensors are missing, have another shape, or are
    more than the architecture has, and where config.json names something that megacl's model has not.
    """
    config = read_config(path / CONFIG)
    names, paths, reader = _weight_files(path)
    tensors = _renamed(reader(paths), config.architecture)
    if names is not None and (missing := sorted(set(names) - set(tensors.facts) - _aliases(names))):
        raise ConversionError(f"{path}: the index names {_list(missing)}, and no file holds it. Copy the files again.")
    named = expand(table_of(config.architecture), config.model)
    notes = [*config.notes, *_check_tensors(path, config, tensors, named)]
    lineage = _lineage_of(path)
    tokenizer, tokens = known_tokenizer(options, path, rows=config.model.vocab_size, lineage=lineage)
    dtypes = {}
    for ours, each in named.items():
        found = [tensors.facts[theirs].dtype for theirs in each.theirs]
        dtypes[ours] = found[0]
        for dtype in found[1:]:
            dtypes[ours] = torch.promote_types(dtypes[ours], dtype)
    if reader is open_bin:
        notes.append("there are no safetensors, so .bin files were unpickled, with weights_only")
    return OpenedModel(
        format="hf",
        path=path,
        model=config.model,
        dtypes=dtypes,
        read=lambda ours: named[ours].join([tensors.read(theirs) for theirs in named[ours].theirs], config.model),
        sources=(*paths, path / CONFIG),
        seq_length=config.seq_length,
        tokenizer=tokenizer,
        tokenizer_vocab_size=tokens,
        notes=tuple(notes),
        lineage=lineage,
    )


def _weight_files(path: Path) -> tuple[Sequence[str] | None, list[Path], Callable[[Sequence[Path]], Tensors]]:
    """The tensors that an index names, if there is one; the files; and what opens them."""
    for whole, index, reader in ((SAFETENSORS, SAFETENSORS_INDEX, open_safetensors), (_BIN, _BIN_INDEX, open_bin)):
        if (path / whole).is_file():
            return None, [path / whole], reader
        if (path / index).is_file():
            weight_map = read_json(path / index).get("weight_map")
            named = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
            if not named or not weight_map:
                raise ConversionError(f"{path / index}: it has no weight_map of file names. Copy it again.")
            files = sorted(set(weight_map.values()))
            if missing := [name for name in files if not (path / name).is_file()]:
                raise ConversionError(f"{path}: {_list(missing)} of the index is missing. Copy it again.")
            return list(weight_map), [path / name for name in files], reader
    raise ConversionError(f"{path}: no model.safetensors and no pytorch_model.bin, nor an index of either.")


def _aliases(names: Sequence[str]) -> set[str]:
    return {name for name in names if name == "lm_head.weight" or _DROPPED.fullmatch(name)}


def _renamed(tensors: Tensors, architecture: str) -> Tensors:
    """With one name for GPT-NeoX's output layer, which is written as embed_out and is lm_head in memory."""
    if architecture != "gpt_neox" or "lm_head.weight" not in tensors.facts or "embed_out.weight" in tensors.facts:
        return tensors
    facts = {("embed_out.weight" if name == "lm_head.weight" else name): each for name, each in tensors.facts.items()}
    return Tensors(facts, lambda name: tensors.read("lm_head.weight" if name == "embed_out.weight" else name))


def _check_tensors(path: Path, config: HuggingFaceConfig, tensors: Tensors, named: Mapping[str, Named]) -> list[str]:
    """Whether the files hold what the configuration says, and what they hold beside it, in notes."""
    class_name = FAMILIES[config.architecture].class_name
    expected = foreign_shapes(named, config.model)
    if missing := [name for name in expected if name not in tensors.facts]:
        raise ConversionError(
            f"{path}: no file holds {_list(missing)}, which a {class_name} has. Copy the files again."
        )
    notes, left = [], [name for name in tensors.facts if name not in expected]
    if buffers := [name for name in left if _DROPPED.fullmatch(name)]:
        notes.append(f"left out {len(buffers)} buffers that follow from the configuration, such as {buffers[0]}")
    left = [name for name in left if name not in buffers]
    head = "embed_out.weight" if config.architecture == "gpt_neox" else "lm_head.weight"
    if config.model.tie_embeddings and head in left:
        embed = named["embed.weight"].theirs[0]
        if not torch.equal(tensors.read(head), tensors.read(embed)):
            raise ConversionError(
                f"{path}: {head} differs from {embed}, and tie_word_embeddings is true. Say false in config.json if "
                "the output layer is one of its own."
            )
        notes.append(f"left out {head}, which is {embed}")
        left.remove(head)
    if left:
        raise ConversionError(f"{path}: it holds {_list(left)}, which a {class_name} as config.json has it has not.")
    for name, shape in expected.items():
        facts: TensorFacts = tensors.facts[name]
        if facts.shape != shape:
            raise ConversionError(f"{path}: {name} is {list(facts.shape)}, and by config.json {list(shape)}.")
        if not facts.dtype.is_floating_point:
            raise ConversionError(f"{path}: {name} is of {facts.dtype}; quantised models are not read.")
    return notes


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _lineage_of(path: Path) -> Lineage | None:
    if not (path / LINEAGE).is_file():
        return None
    try:
        return load_lineage(path, LINEAGE)
    except CheckpointError as error:
        raise ConversionError(
            f"{str(error).rstrip('.')}. Take it away to convert the model without its history."
        ) from None
