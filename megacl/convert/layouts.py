"""The orders of rows in which formats lay one tensor: pure functions, both ways, for weights and biases alike.

Rows are along the first dimension; a weight is [rows, inputs], a bias [rows]. With n query heads, g key/value heads
and heads of d rows, a fused qkv of (n + 2 g) d rows is one of:

    block     all query heads, all key heads, all value heads (megacl's own)
    grouped   for each key/value head its n / g query heads, its key head, its value head
    per head  grouped with g = n: q0 k0 v0 q1 k1 v1 ...

A gated MLP's first layer of 2 F rows has the gate's rows first (megacl's own), or up's. An embedding's padding is rows
behind those of the tokens. Functions return views where they can, work on any device, "meta" too, and keep the dtype.
They raise ValueError where the rows do not divide.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _head_size(rows: int, heads: int, kv_heads: int) -> int:
    total = heads + 2 * kv_heads
    if rows % total or heads % kv_heads:
        raise ValueError(f"{rows} rows are no queries, keys and values of {heads} heads and {kv_heads} key/value heads")
    return rows // total


def split_qkv(block: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [n d, ...], keys [g d, ...] and values [g d, ...] of a block."""
    d = _head_size(block.shape[0], heads, kv_heads)
    q, k, v = torch.split(block, [heads * d, kv_heads * d, kv_heads * d])
    return q, k, v


def join_qkv(parts: Sequence[Tensor]) -> Tensor:
    """The block of queries, keys and values."""
    return torch.cat(tuple(parts))


def block_to_grouped(block: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The same rows, by key/value head."""
    inner = block.shape[1:]
    d = _head_size(block.shape[0], heads, kv_heads)
    q, k, v = split_qkv(block, heads, kv_heads)
    by_group = [q.reshape(kv_heads, heads // kv_heads * d, *inner)]
    by_group += [part.reshape(kv_heads, d, *inner) for part in (k, v)]
    return torch.cat(by_group, dim=1).reshape(block.shape)


def grouped_to_block(grouped: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The inverse of `block_to_grouped`."""
    inner = grouped.shape[1:]
    d = _head_size(grouped.shape[0], heads, kv_heads)
    by_group = grouped.reshape(kv_heads, -1, *inner)
    parts = torch.split(by_group, [heads // kv_heads * d, d, d], dim=1)
    return torch.cat([part.reshape(-1, *inner) for part in parts])


def block_to_per_head(block: Tensor, heads: int) -> Tensor:
    """The same rows, head by head; as many key/value heads as query heads."""
    return block_to_grouped(block, heads, heads)


def per_head_to_block(per_head: Tensor, heads: int) -> Tensor:
    """The inverse of `block_to_per_head`."""
    return grouped_to_block(per_head, heads, heads)


def split_halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second half of the rows: of a gated MLP's first layer, gate and up."""
    if tensor.shape[0] % 2:
        raise ValueError(f"{tensor.shape[0]} rows have no halves")
    first, second = tensor.chunk(2)
    return first, second


def swap_halves(tensor: Tensor) -> Tensor:
    """Up before gate becomes gate before up, and the other way round."""
    return torch.cat(split_halves(tensor)[::-1])


def cut_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first rows: an embedding without its padding."""
    if not 0 < rows <= tensor.shape[0]:
        raise ValueError(f"{rows} of {tensor.shape[0]} rows")
    return tensor[:rows]


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """With rows of zeros behind: an embedding with padding.

    As weights of the output layer they give padding the logit 0; the original's rows are not known any more.
    """
    if rows < tensor.shape[0]:
        raise ValueError(f"{rows} rows cannot hold {tensor.shape[0]}")
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


def fit_rows(tensor: Tensor, rows: int) -> Tensor:
    """`cut_rows` or `pad_rows`, whichever it takes to come to so many rows."""
    return cut_rows(tensor, rows) if rows <= tensor.shape[0] else pad_rows(tensor, rows)
