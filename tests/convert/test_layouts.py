"""Orders of rows: each against a loop over heads by hand, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacl.convert import layouts
from megacl.convert.mapping import QKV_GROUPED, QKV_PER_HEAD, SAME, Rule, expand, foreign_shapes, parameter_shapes
from megacl.model.config import ModelConfig

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.sampled_from([(), (5,)]))
"""Key/value heads, query heads for each, rows of a head, what follows the rows."""


def block_of(kv_heads: int, repeat: int, d: int, inner: tuple[int, ...]) -> Tensor:
    rows = (kv_heads * repeat + 2 * kv_heads) * d
    return torch.arange(rows * max(1, *inner, 1), dtype=torch.float32).reshape(rows, *inner)


def grouped_by_hand(block: Tensor, kv_heads: int, repeat: int, d: int) -> Tensor:
    heads = kv_heads * repeat
    rows = []
    for group in range(kv_heads):
        for head in range(group * repeat, (group + 1) * repeat):
            rows += [block[head * d + row] for row in range(d)]
        rows += [block[(heads + group) * d + row] for row in range(d)]
        rows += [block[(heads + kv_heads + group) * d + row] for row in range(d)]
    return torch.stack(rows)


@given(SHAPES)
def test_grouped_rows_are_those_of_each_group_in_turn_and_come_back(
    shape: tuple[int, int, int, tuple[int, ...]],
) -> None:
    kv_heads, repeat = shape[:2]
    block = block_of(*shape)
    grouped = layouts.block_to_grouped(block, kv_heads * repeat, kv_heads)
    assert torch.equal(grouped, grouped_by_hand(block, kv_heads, repeat, shape[2]))
    assert torch.equal(layouts.grouped_to_block(grouped, kv_heads * repeat, kv_heads), block)
    assert torch.equal(layouts.join_qkv(layouts.split_qkv(block, kv_heads * repeat, kv_heads)), block)
    if repeat == 1:
        assert torch.equal(layouts.block_to_per_head(block, kv_heads), grouped)
        assert torch.equal(layouts.per_head_to_block(grouped, kv_heads), block)


def test_halves_swap_and_vocabularies_are_cut_and_padded_with_zeros() -> None:
    rows = torch.arange(8.0).reshape(4, 2)
    assert torch.equal(layouts.swap_halves(rows), rows[[2, 3, 0, 1]])
    assert torch.equal(layouts.fit_rows(rows, 3), rows[:3])
    padded = layouts.fit_rows(rows, 6)
    assert torch.equal(padded[:4], rows)
    assert not padded[4:].any()
    assert torch.equal(layouts.fit_rows(padded, 4), rows)


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="7 rows are no queries, keys and values of 2 heads and 1 key/value heads"):
        layouts.split_qkv(torch.zeros(7, 3), 2, 1)
    with pytest.raises(ValueError, match="3 rows have no halves"):
        layouts.swap_halves(torch.zeros(3))
    with pytest.raises(ValueError, match="3 rows cannot hold 4"):
        layouts.pad_rows(torch.zeros(4), 3)


def test_a_table_is_written_out_for_the_parameters_of_a_model_in_their_order() -> None:
    config = ModelConfig(vocab_size=10, hidden_size=8, num_layers=2, num_attention_heads=2)
    own = [name for name in parameter_shapes(config) if name.startswith("layers.")]
    keys = dict.fromkeys(".".join(["layers", *name.split(".")[2:-1]]) for name in own)
    table = {key: Rule((f"block{{i}}/{key}/{{part}}",), SAME) for key in [*keys, "embed", "final_norm", "head"]}
    table["layers.attention.qkv"] = Rule(("x.{i}.qkv_{part}",), QKV_PER_HEAD)
    named = expand(table, config, first_layer=2)
    assert list(named) == list(parameter_shapes(config))
    assert named["layers.1.attention.qkv.bias"].theirs == ("x.3.qkv_bias",)
    shapes = foreign_shapes(named, config)
    assert shapes["x.2.qkv_weight"] == (24, 8)
    ours = torch.randn(24, 8)
    theirs = named["layers.0.attention.qkv.weight"].split(ours, config)
    assert torch.equal(named["layers.0.attention.qkv.weight"].join(theirs, config), ours)
    assert torch.equal(theirs[0], layouts.block_to_per_head(ours, 2))
    assert torch.equal(QKV_GROUPED.split(ours, config)[0], theirs[0])
