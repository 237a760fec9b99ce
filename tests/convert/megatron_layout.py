"""Writes a whole model as Megatron-LM does: the legacy tree, megatron-core's names, and the torch_dist folder.

Numpy alone cuts the arrays; megacl's converters are not imported. The layout is that of Megatron-LM's
megatron/training/checkpointing.py, megatron/legacy/model/ and megatron/core/. On 2026-11-28 megatron-core 0.16.1's own
GPTModel (local layers, one rank) loaded what `core_model` makes and computed transformers' logits within 3e-6
(LayerNorm with fused GELU, Llama with grouped keys, Qwen2, Qwen3), and the torch_dist folders that it saved were read
alike.
"""

import argparse
import enum
import io
import json
import pickle
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from whole_models import Array, Whole, fused_heads

State = dict[str, Array]


class ModelType(enum.Enum):
    """Stands for megatron.core.enums.ModelType, which Megatron's arguments hold."""

    encoder_or_decoder = 1


ModelType.__module__, ModelType.__qualname__ = "megatron.core.enums", "ModelType"


def arguments(whole: Whole, tensor_parallel: int, pipeline_parallel: int, **changes: Any) -> argparse.Namespace:
    """Megatron's arguments, as far as they say what the model is."""
    values: dict[str, Any] = {
        "num_layers": whole.layers,
        "hidden_size": whole.hidden,
        "ffn_hidden_size": whole.ffn,
        "num_attention_heads": whole.heads,
        "kv_channels": whole.head_dim,
        "group_query_attention": whole.kv_heads != whole.heads,
        "num_query_groups": whole.kv_heads if whole.kv_heads != whole.heads else 1,
        "position_embedding_type": "rope",
        "rotary_percent": whole.rotary_pct,
        "rotary_base": int(whole.rope_theta),
        "max_position_embeddings": 64,
        "seq_length": 64,
        "swiglu": whole.gated,
        "bias_gelu_fusion": whole.gelu == "tanh",
        "normalization": "RMSNorm" if whole.gated else "LayerNorm",
        "norm_epsilon": whole.eps,
        "apply_layernorm_1p": False,
        "untie_embeddings_and_output_weights": not whole.tied,
        "add_bias_linear": whole.attention_bias == "all",
        "add_qkv_bias": whole.attention_bias == "qkv",
        "qk_layernorm": whole.qk_norm,
        "padded_vocab_size": whole.vocab,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "virtual_pipeline_model_parallel_size": None,
        "num_experts": None,
        "params_dtype": torch.float32,
        "model_type": ModelType.encoder_or_decoder,
    }
    return argparse.Namespace(**values | changes)


def old_order(fused: Array, version: float) -> Array:
    """One rank's [heads, 3, head_dim, ...] in the order of a checkpoint_version, as rows."""
    if version < 1:
        fused = fused.swapaxes(0, 1)  # [3, heads, head_dim]
    elif version < 2:
        fused = np.moveaxis(fused, 1, 2)  # [heads, head_dim, 3]
    rows = fused.shape[0] * fused.shape[1] * fused.shape[2]
    return np.ascontiguousarray(fused).reshape(rows, *fused.shape[3:])


def fused_rows(whole: Whole, layer: int, kind: str, parts: int, version: float) -> list[Array]:
    heads = fused_heads(whole, layer, kind)
    if version < 2:
        assert whole.kv_heads == whole.heads, "grouped queries came later"
        return [old_order(part, version) for part in np.split(heads, parts, axis=0)]
    return np.split(heads.reshape(-1, *heads.shape[3:]), parts, axis=0)


def layer_of(whole: Whole, layer: int, parts: int, version: float) -> dict[str, list[Array]]:
    """One layer by part and rank: qkv, proj, fc1, fc2 and norms, with `.weight` and `.bias`."""
    t, out = whole.tensors, {}
    for kind in ("weight", "bias"):
        if f"{layer}.q.{kind}" in t:
            out[f"qkv.{kind}"] = fused_rows(whole, layer, kind, parts, version)
        if f"{layer}.up.{kind}" in t:
            ups = np.split(t[f"{layer}.up.{kind}"], parts, axis=0)
            if whole.gated:
                gates = np.split(t[f"{layer}.gate.{kind}"], parts, axis=0)
                ups = [np.concatenate(pair) for pair in zip(gates, ups, strict=True)]  # the gate first
            out[f"fc1.{kind}"] = ups
        for part, name in (("o", "proj"), ("down", "fc2")):
            value = t.get(f"{layer}.{part}.{kind}")
            if value is not None:
                out[f"{name}.{kind}"] = np.split(value, parts, axis=1) if kind == "weight" else [value] * parts
        for part in ("norm1", "norm2", "q_norm", "k_norm"):
            if f"{layer}.{part}.{kind}" in t:
                out[f"{part}.{kind}"] = [t[f"{layer}.{part}.{kind}"]] * parts
    return out


LEGACY = {
    "norm1": "input_norm",
    "norm2": "post_attention_norm",
    "qkv": "self_attention.query_key_value",
    "proj": "self_attention.dense",
    "fc1": "mlp.dense_h_to_4h",
    "fc2": "mlp.dense_4h_to_h",
}
OLDER = LEGACY | {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
OLDEST = OLDER | {"qkv": "attention.query_key_value", "proj": "attention.dense"}
CORE = {
    "norm1": "input_layernorm",
    "norm2": "pre_mlp_layernorm",
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
    "q_norm": "self_attention.q_layernorm",
    "k_norm": "self_attention.k_layernorm",
}
ENGINE = CORE | {"norm1": "self_attention.linear_qkv.layer_norm_", "norm2": "mlp.linear_fc1.layer_norm_"}
"""megatron-core with TransformerEngine's layers: norms inside the linear layers that follow them."""


def named(names: dict[str, str], part: str) -> str:
    """ "qkv.weight" -> its full name inside a layer."""
    which, _, kind = part.partition(".")
    place = names[which]
    return place + kind if place.endswith("_") else f"{place}.{kind}"


def stage(whole: Whole, rank: int, parts: int, layers: range, names: dict[str, str], version: float) -> State:
    """The layers of one pipeline stage on one tensor-parallel rank, numbered from 0."""
    return {
        f"layers.{index}.{named(names, part)}": pieces[rank]
        for index, layer in enumerate(layers)
        for part, pieces in layer_of(whole, layer, parts, version).items()
    }


def as_tensors(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: as_tensors(value)
        if isinstance(value, dict)
        else torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, np.ndarray)
        else value
        for name, value in tree.items()
    }


def legacy_model(whole: Whole, flat: State, *, first: bool, last: bool, rank: int, parts: int, old: bool) -> Any:
    """The nested tree of one stage."""
    t = whole.tensors
    embed = np.split(t["embed.weight"], parts)[rank]
    tree: dict[str, Any] = {"transformer" if old else "encoder": flat}
    if first:
        tree["embedding"] = {"word_embeddings": {"weight": embed}}
    if last:
        final = "final_layernorm" if old else "final_norm"
        flat |= {f"{final}.{kind}": t[f"final.{kind}"] for kind in ("weight", "bias") if f"final.{kind}" in t}
        if not whole.tied:
            tree["output_layer"] = {"weight": np.split(t["head.weight"], parts)[rank]}
    model: dict[str, Any] = {"language_model": tree}
    if last and not first and whole.tied:
        model["word_embeddings_for_head"] = {"weight": embed}
    return as_tensors(model)


def final_norm(whole: Whole) -> State:
    t = whole.tensors
    return {
        f"decoder.final_layernorm.{kind}": t[f"final.{kind}"] for kind in ("weight", "bias") if f"final.{kind}" in t
    }


def core_model(whole: Whole, flat: State, *, first: bool, last: bool, rank: int, parts: int, one_p: bool) -> Any:
    """The flat state of one stage by megatron-core's names, with the extra state that its modules leave."""
    t = whole.tensors
    state: dict[str, Any] = {f"decoder.{name}": value for name, value in flat.items()}
    if first:
        state["embedding.word_embeddings.weight"] = np.split(t["embed.weight"], parts)[rank]
    if last:
        state |= {
            f"decoder.final_layernorm.{kind}": t[f"final.{kind}"] for kind in ("weight", "bias")[: 2 - whole.gated]
        }
        if not whole.tied or not first:
            state["output_layer.weight"] = np.split(t.get("head.weight", t["embed.weight"]), parts)[rank]
    if one_p:  # stored as gamma - 1
        state = {
            name: value - 1 if "norm" in name and name.endswith("weight") and value.ndim == 1 else value
            for name, value in state.items()
        }
    state["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"none")
    state["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
    return as_tensors(state)


def write_megatron(
    folder: Path,
    whole: Whole,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    names: dict[str, str] = LEGACY,
    version: float | None = 3.0,
    release: bool = False,
    virtual: int = 1,
    **changes: Any,
) -> Path:
    """A Megatron SAVE folder of torch files, mp_rank_TT[_PPP]/model_optim_rng.pt; returns the folder."""
    core = names in (CORE, ENGINE)
    tag = folder / ("release" if release else "iter_0000007")
    tag.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("release" if release else "7")
    each = whole.layers // pipeline_parallel // virtual
    one_p = bool(changes.get("apply_layernorm_1p"))
    for rank in range(tensor_parallel):
        for place in range(pipeline_parallel):
            models = []
            for chunk in range(virtual):  # a stage has the layers of its turn in every round
                begin = (chunk * pipeline_parallel + place) * each
                flat = stage(whole, rank, tensor_parallel, range(begin, begin + each), names, version or 0.0)
                first, last = begin == 0, begin + each == whole.layers
                ends = {"first": first, "last": last, "rank": rank, "parts": tensor_parallel}
                if core:
                    models.append(core_model(whole, flat, one_p=one_p, **ends))
                else:
                    models.append(legacy_model(whole, flat, old=names is not LEGACY, **ends))
            state: dict[str, Any] = {
                "args": arguments(whole, tensor_parallel, pipeline_parallel, **changes),
                "iteration": 7,
                "rng_state": [{"np_rng_state": np.random.RandomState(1).get_state()}],
                **({"model": models[0]} if virtual == 1 else {f"model{n}": model for n, model in enumerate(models)}),
            }
            if version is not None:
                state["checkpoint_version"] = version
            name = f"mp_rank_{rank:02d}" + (f"_{place:03d}" if pipeline_parallel > 1 else "")
            (tag / name).mkdir()
            save(state, tag / name / "model_optim_rng.pt")
    return folder


def save(state: Any, file: Path) -> None:
    """torch.save, with the module at hand from which Megatron's enums come."""
    names = ["megatron", "megatron.core", "megatron.core.enums"]
    stand_ins = {name: types.ModuleType(name) for name in names}
    stand_ins[names[-1]].ModelType = ModelType  # type: ignore[attr-defined]
    sys.modules.update(stand_ins)
    try:
        torch.save(state, file)
    finally:
        for name in names:
            del sys.modules[name]


def global_state(whole: Whole, *, stacked: bool) -> dict[str, Array]:
    """Every tensor whole, by its name in a torch_dist folder; layers lie stacked, or each has a name."""
    t = whole.tensors
    state: dict[str, Array] = {"embedding.word_embeddings.weight": t["embed.weight"]}
    if not whole.tied:
        state["output_layer.weight"] = t["head.weight"]
    state |= final_norm(whole)
    layers = [layer_of(whole, layer, 1, 3.0) for layer in range(whole.layers)]
    for part in layers[0]:
        name = named(ENGINE, part)
        if stacked:
            state[f"decoder.layers.{name}"] = np.stack([layer[part][0] for layer in layers])
        else:
            state |= {f"decoder.layers.{index}.{name}": layer[part][0] for index, layer in enumerate(layers)}
    return state


def write_torch_dist(
    folder: Path, whole: Whole, *, stacked: bool = True, ranks: tuple[int, int] | None = None, **changes: Any
) -> Path:
    """A Megatron SAVE folder in the torch_dist format.

    ranks: (tensor, pipeline) parallel sizes, whose pieces are written by hand as Megatron's ranks write them; None:
    torch.distributed.checkpoint writes it, of one rank.
    """
    import torch.distributed.checkpoint as dcp

    tag = folder / "iter_0000007"
    tag.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    state = as_tensors(global_state(whole, stacked=stacked))
    if ranks is None:
        state["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(whole.hidden)
        state["decoder.layers.self_attention.linear_qkv._extra_state/shard_0_3"] = io.BytesIO(b"none")
        with warnings.catch_warnings(action="ignore"):  # that there is one process only
            dcp.save(state, storage_writer=dcp.FileSystemWriter(tag), no_dist=True)
    else:
        write_pieces(tag, state, *ranks)
    save({"args": arguments(whole, 2, 1, **changes), "checkpoint_version": 3.0, "iteration": 7}, tag / "common.pt")
    form = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (tag / "metadata.json").write_text(json.dumps(form | {"common_backend": "torch", "common_backend_version": 1}))
    return folder


def write_pieces(tag: Path, state: dict[str, torch.Tensor], tensor_parallel: int, stages: int) -> None:
    """.metadata and *.distcp of several ranks: a piece a layer, cut by rows or columns; of fc1, gate and up apart."""
    entries, stored = {}, {}
    place = dict.fromkeys(range(tensor_parallel * stages), 0)
    for name, tensor in state.items():
        chunks = []
        for offsets, piece in pieces_of(name, tensor, tensor_parallel):
            rank = len(chunks) % len(place)
            content = io.BytesIO()
            torch.save(piece.clone(), content)
            file = tag / f"__{rank}_0.distcp"
            with file.open("ab") as stream:
                stream.write(content.getvalue())
            where = torch.Size(offsets)
            chunks.append(metadata.ChunkStorageMetadata(where, piece.shape))
            stored[metadata.MetadataIndex(name, where)] = filesystem._StorageInfo(
                file.name, place[rank], content.tell()
            )
            place[rank] += content.tell()
        properties = metadata.TensorProperties(tensor.dtype)
        entries[name] = metadata.TensorStorageMetadata(properties, tensor.shape, chunks)
    plans = [SavePlan(_create_write_items(name, tensor)) for name, tensor in state.items()]  # as Megatron leaves them
    found = metadata.Metadata(entries, planner_data=plans, storage_data=stored)
    (tag / ".metadata").write_bytes(pickle.dumps(found))


def pieces_of(name: str, tensor: torch.Tensor, parts: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(offsets, piece) of one tensor, layer by layer where it lies stacked."""
    layered = name.startswith("decoder.layers.") and not name.split(".")[2].isdigit()
    for layer in range(tensor.shape[0]) if layered else [None]:
        piece = tensor[layer : layer + 1] if layered else tensor
        front = [layer] if layered else []
        axis = int(layered) + ("linear_proj" in name or "linear_fc2" in name)
        if "norm" in name or piece.ndim <= axis or (axis == 2 - (not layered) and name.endswith("bias")):
            yield [*front, *[0] * (piece.ndim - len(front))], piece
            continue
        cut = parts * (2 if "linear_fc1" in name else 1)
        begin = 0
        for share in piece.chunk(cut, dim=axis):  # the last one may be smaller
            offsets = [*front, *[0] * (piece.ndim - len(front))]
            offsets[axis] = begin
            begin += share.shape[axis]
            yield offsets, share
