"""Parallelism, applied from outside to the plain model of one device.

    ops = parallel_kernels(ops, ranks)
    model.use(ops)
    apply_tensor_parallel(model, ranks)      # a model on "meta", or one that has its weights
    apply_sequence_parallel(model, ranks)

The ranks of a tensor-parallel group share every layer, and the vocabulary; those of a sequence-parallel group share
every sequence. Names and whole values of the parameters stay those of the plain model, so weights and checkpoints do.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megacl.kernels import Choice, Kernels
from megacl.model.gpt import GPT, Block
from megacl.model.layers import GeluMLP
from megacl.parallel import vocabulary
from megacl.parallel.ranks import Ranks
from megacl.parallel.tensor import RowParallel, column_parallel, copy_to, cut, gather
from megacl.parallel.ulysses import over_sequence


def parallel_kernels(ops: Kernels, ranks: Ranks) -> Kernels:
    """The same ops, but for those whose values are spread over a group of ranks."""
    if ranks.tp_size > 1:
        loss = functools.partial(vocabulary.linear_cross_entropy, ranks=ranks)
        ops = _replace(ops, "linear_cross_entropy", loss, "by vocabulary", f"{ranks.tp_size} ranks share it")
    if ranks.sp_size > 1:
        ops = _replace(ops, "rotary_attention", None, "apart", "positions are turned before sequences are exchanged")
        for choice in ops.choices:
            if choice.op in ("attention", "document_attention"):
                attend = over_sequence(getattr(ops, choice.op), ranks)
                why = f"{ranks.sp_size} ranks share each sequence; {choice.why}"
                ops = _replace(ops, choice.op, attend, f"ulysses, {choice.implementation}", why)
    return ops


def _replace(ops: Kernels, op: str, function: Any, name: str, why: str) -> Kernels:
    choices = tuple(Choice(op, name, why) if choice.op == op else choice for choice in ops.choices)
    changed: dict[str, Any] = {op: function}
    return dataclasses.replace(ops, choices=choices, **changed)


def apply_tensor_parallel(model: GPT, ranks: Ranks) -> None:
    """Leaves this rank its part of every layer: heads, the MLP's width, and rows of the vocabulary.

    The sizes must divide by ranks.tp_size; where it is 1, nothing is done. It comes after `GPT.use`, since it changes
    the ops of the norms of queries and keys.
    """
    if ranks.tp_size == 1:
        return
    config = model.config
    queries, keys = config.query_size, config.kv_size
    for layer in model.layers:
        assert isinstance(layer, Block)
        attention, mlp = layer.attention, layer.mlp
        attention.heads //= ranks.tp_size
        attention.kv_heads //= ranks.tp_size
        column_parallel(attention.qkv, (queries, keys, keys), ranks)
        attention.out = RowParallel(attention.out, ranks)
        for norm in (attention.q_norm, attention.k_norm):
            if norm is not None:
                norm.ops = _weights_of_all_heads(norm.ops, ranks)
        if isinstance(mlp, GeluMLP):
            column_parallel(mlp.up, (config.mlp_size,), ranks)
        else:
            column_parallel(mlp.gate_up, (config.mlp_size, config.mlp_size), ranks)
        mlp.down = RowParallel(mlp.down, ranks)
    model.embed = vocabulary.VocabularyParallelEmbedding(model.embed, ranks)
    cut(model.head, "weight", dim=0, sections=(config.vocab_size,), ranks=ranks)
    model.tie()
    model.head.register_forward_hook(functools.partial(_gather_logits, ranks))


def _weights_of_all_heads(ops: Kernels, ranks: Ranks) -> Kernels:
    """Norms by one weight for all heads, of which each rank has some: the ranks' gradients of it are added up."""

    def added_up(norm: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def of_own_heads(x: Tensor, *weights_and_eps: Any) -> tuple[Tensor, Tensor]:
            return norm(x, *(copy_to(each, ranks) if isinstance(each, Tensor) else each for each in weights_and_eps))

        return of_own_heads

    return dataclasses.replace(ops, rms_norm=added_up(ops.rms_norm), layer_norm=added_up(ops.layer_norm))


def apply_sequence_parallel(model: GPT, ranks: Ranks) -> None:
    """Leaves this rank its part of each row while a loss is computed; rows must divide by ranks.sp_size."""
    model.time_part = (ranks.sp_rank, ranks.sp_size)


def _gather_logits(
    ranks: Ranks, head: nn.Module, inputs: tuple[Tensor, Tensor | None], result: Tensor
) -> Tensor | None:
    """Whole rows of logits of each rank's part; a loss stays as it is."""
    return torch.cat(gather(result, ranks.tp_group), dim=-1) if inputs[1] is None else None
