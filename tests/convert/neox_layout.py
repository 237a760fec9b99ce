"""Writes a whole model as gpt-neox does: layer files of a pipeline, or one module for each tensor-parallel rank.

Numpy alone cuts the arrays, and torch.save writes them; megacl's converters are not imported. The layout is that of
gpt-neox's own megatron/model/{transformer,gpt2_model,word_embeddings,norms}.py and checkpointing.py. On 2026-11-28
gpt-neox's tools/ckpts/convert_neox_to_hf.py (ea7aefd8) made the whole model's tensors of what this writes: parallel
residual on 1 and 2 ranks, both names of the MLP, pipeline and sequential, llama with grouped keys on 1 and 2 ranks.
Residuals one after the other on 2 ranks gave it the row-parallel biases twice, as is known of it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from whole_models import Array, Whole, fused_heads

Named = dict[int, dict[str, Array]]
"""Layer's place -> its tensors by name, on one rank."""


def settings(whole: Whole, tensor_parallel: int = 1, **changes: Any) -> dict[str, Any]:
    """The YAML of such a run."""
    tree: dict[str, Any] = {
        "pipe_parallel_size": 1,
        "model_parallel_size": tensor_parallel,
        "num_layers": whole.layers,
        "hidden_size": whole.hidden,
        "num_attention_heads": whole.heads,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "pos_emb": "rotary",
        "rotary_pct": whole.rotary_pct,
        "rotary_emb_base": int(whole.rope_theta),
        "no_weight_tying": not whole.tied,
        "gpt_j_residual": whole.parallel,
        "output_layer_parallelism": "column",
        "make_vocab_size_divisible_by": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    }
    if whole.kv_heads != whole.heads:
        tree["num_kv_heads"] = whole.kv_heads
    if whole.gated:
        tree |= {"norm": "rmsnorm", "rms_norm_epsilon": whole.eps, "activation": "swiglu"}
        tree |= {"use_bias_in_attn_linear": whole.attention_bias == "all", "use_bias_in_mlp": whole.mlp_bias}
        tree["intermediate_size"] = 3 * whole.ffn  # a number from which F cannot be told, as in the real files
    else:
        tree |= {"norm": "layernorm", "layernorm_epsilon": whole.eps, "activation": "gelu"}
        tree["bias_gelu_fusion"] = whole.gelu == "tanh"
    return tree | changes


def cut(array: Array, parts: int, axis: int) -> list[Array]:
    return np.split(array, parts, axis=axis)


def row_bias(whole: Whole, bias: Array, parts: int) -> list[Array]:
    """What ranks hold of a row-parallel bias: unlike summands of it (parallel residual), or each the whole."""
    if not whole.parallel:
        return [bias] * parts
    draw = np.random.default_rng(5)
    summands = [draw.standard_normal(bias.shape).astype(np.float32) for _ in range(parts - 1)]
    return [*summands, (bias - sum(summands)).astype(np.float32)]


def fused(whole: Whole, layer: int, kind: str, parts: int) -> list[Array]:
    """query_key_value on each rank: whole heads (as many keys as queries), or a block of q, k and v (grouped)."""
    if whole.heads == whole.kv_heads:
        heads = fused_heads(whole, layer, kind)
        return cut(heads.reshape(-1, *heads.shape[3:]), parts, 0)
    pieces = [cut(whole.tensors[f"{layer}.{part}.{kind}"], parts, 0) for part in "qkv"]
    return [np.concatenate(piece) for piece in zip(*pieces, strict=True)]


def mlp(whole: Whole, layer: int, parts: int, mlp_names: str) -> dict[str, list[Array]]:
    """The MLP's tensors by rank; mlp_names: "dense" (before September 2024), "linear" (since), "w" (old llama)."""
    t, out = whole.tensors, {}
    down, up = {"dense": ("dense_4h_to_h", "dense_h_to_4h"), "linear": ("linear2", "linear1"), "w": ("w2", "w3")}[
        mlp_names
    ]
    out[f"mlp.{down}.weight"] = cut(t[f"{layer}.down.weight"], parts, 1)
    if whole.mlp_bias:
        out[f"mlp.{down}.bias"] = row_bias(whole, t[f"{layer}.down.bias"], parts)
    for kind in ("weight", "bias") if whole.mlp_bias else ("weight",):
        ups = cut(t[f"{layer}.up.{kind}"], parts, 0)
        if not whole.gated:
            out[f"mlp.{up}.{kind}"] = ups
            continue
        gates = cut(t[f"{layer}.gate.{kind}"], parts, 0)
        if mlp_names == "w":
            out[f"mlp.w3.{kind}"], out[f"mlp.w1.{kind}"] = ups, gates
        else:
            out[f"mlp.linear1.{kind}"] = [np.concatenate(pair) for pair in zip(ups, gates, strict=True)]
    return out


def norm(whole: Whole, name: str, target: str) -> dict[str, Array]:
    t = whole.tensors
    if whole.gated:
        return {f"{target}.scale": t[f"{name}.weight"]}
    return {f"{target}.{kind}": t[f"{name}.{kind}"] for kind in ("weight", "bias")}


def ranks_of(whole: Whole, parts: int, *, mlp_names: str = "linear", old_buffers: bool = False) -> list[Named]:
    """For each tensor-parallel rank, its tensors by layer."""
    t = whole.tensors
    ranks: list[Named] = [{} for _ in range(parts)]

    def put(layer: int, name: str, pieces: list[Array]) -> None:
        for rank, piece in zip(ranks, pieces, strict=True):
            rank.setdefault(layer, {})[name] = piece

    put(0, "word_embeddings.weight", cut(t["embed.weight"], parts, 0))
    for layer in range(whole.layers):
        at = layer + 2
        for name, target in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            for full, value in norm(whole, f"{layer}.{name}", target).items():
                put(at, full, [value] * parts)
        for kind in ("weight", "bias") if whole.attention_bias == "all" else ("weight",):
            put(at, f"attention.query_key_value.{kind}", fused(whole, layer, kind, parts))
        put(at, "attention.dense.weight", cut(t[f"{layer}.o.weight"], parts, 1))
        if whole.attention_bias == "all":
            put(at, "attention.dense.bias", row_bias(whole, t[f"{layer}.o.bias"], parts))
        for full, pieces in mlp(whole, layer, parts, mlp_names).items():
            put(at, full, pieces)
        if old_buffers:
            put(at, "attention.rotary_emb.inv_freq", [np.ones(2, np.float32)] * parts)
    for full, value in norm(whole, "final", "norm").items():
        put(whole.layers + 3, full, [value] * parts)
    if not whole.tied:
        put(whole.layers + 4, "final_linear.weight", cut(t["head.weight"], parts, 0))
    return ranks


def tensors(arrays: dict[str, Array], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(dtype) for name, array in arrays.items()}


def client_state(whole: Whole, parts: int) -> dict[str, Any]:
    """What gpt-neox keeps beside the weights, as far as it bears on reading them: NumPy's state is among it."""
    return {
        "iteration": 7,
        "args": {"num_layers": whole.layers, "hidden_size": whole.hidden, "model_parallel_size": parts},
        "np_rng_state": np.random.RandomState(1).get_state(),
        "random_rng_state": (3, (1, 2), None),
        "mp_world_size": parts,
    }


def write_neox(
    folder: Path,
    whole: Whole,
    *,
    tensor_parallel: int = 1,
    sequential: bool = False,
    mlp_names: str = "linear",
    old_buffers: bool = False,
    dtype: torch.dtype = torch.float32,
    dashes: bool = False,
    **changes: Any,
) -> Path:
    """A gpt-neox SAVE folder with one checkpoint, global_step7, and its YAML in configs/; returns the folder."""
    tag = folder / "global_step7"
    (tag / "configs").mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    tree = settings(whole, tensor_parallel, pipe_parallel_size=0 if sequential else 1, **changes)
    if dashes:
        tree = {name.replace("_", "-"): value for name, value in tree.items()}
    text = "# a comment\n" + json.dumps(tree, indent=2)  # the project's YAML is JSON with comments
    (tag / "configs" / "model.yml").write_text(text)
    for rank, layers in enumerate(ranks_of(whole, tensor_parallel, mlp_names=mlp_names, old_buffers=old_buffers)):
        state: dict[str, Any] = {"module": None, **client_state(whole, tensor_parallel)}
        if sequential:
            state["module"] = {
                f"sequential.{at}.{name}": value
                for at, named in layers.items()
                for name, value in tensors(named, dtype).items()
            }
        else:
            for at, named in layers.items():
                torch.save(tensors(named, dtype), tag / f"layer_{at:02d}-model_{rank:02d}-model_states.pt")
        torch.save(state, tag / f"mp_rank_{rank:02d}_model_states.pt")
    return folder
