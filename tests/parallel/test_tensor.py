"""What of a parameter lies where, and pairs of parallel layers against one plain pair."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megacl.parallel.ranks import Ranks
from megacl.parallel.tensor import RowParallel, Shard, column_parallel, cut, gather, shard_of, sum_over, take_part
from tests.ranks import arranged, run_on_ranks


@given(
    size=st.sampled_from([1, 2, 3, 8]),
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dim=st.integers(0, 1),
    other=st.integers(1, 3),
)
def test_the_parts_of_all_ranks_are_the_whole(size, parts, dim, other):
    sections = tuple(part * size for part in parts)
    shape = [other, other]
    shape[dim] = sum(sections)
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    shards = [Shard(dim, sections, rank, size) for rank in range(size)]
    taken = [shard.take(whole) for shard in shards]
    assert {part.numel() * size for part in taken} == {whole.numel()}
    for shard, part in zip(shards, taken, strict=True):
        assert torch.equal(shard.join(taken), whole)
        assert shard.whole_shape(part.shape) == whole.shape
        assert part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_each_rank_has_the_queries_keys_and_values_of_its_heads():
    heads, kv_heads, width = 4, 2, 3
    row = [f"{kind}{head}" for kind, many in (("q", heads), ("k", kv_heads), ("v", kv_heads)) for head in range(many)]
    number_of_head = torch.arange(len(row)).repeat_interleave(width)[:, None]
    sections = (heads * width, kv_heads * width, kv_heads * width)
    for rank, expected in enumerate([["q0", "q1", "k0", "v0"], ["q2", "q3", "k1", "v1"]]):
        taken = Shard(0, sections, rank, 2).take(number_of_head)
        assert [row[int(number)] for number in taken[::width, 0]] == expected


def test_what_is_cut_on_meta_stays_there_and_takes_its_part_later():
    module = nn.Linear(4, 6, device="meta")
    cut(module, "weight", dim=0, sections=(4, 2), ranks=Ranks(1, 2, tp_rank=1, tp_size=2))
    assert (module.weight.is_meta, module.weight.shape) == (True, (3, 4))
    assert shard_of(module.bias) is None
    whole = torch.arange(24.0).view(6, 4)
    assert torch.equal(take_part(module.weight, whole), whole[[2, 3, 5]])
    assert torch.equal(take_part(module.bias, whole), whole)


def plain_pair() -> tuple[nn.Linear, nn.Linear]:
    generator = torch.Generator().manual_seed(5)
    up, down = nn.Linear(5, 8, dtype=torch.float64), nn.Linear(8, 5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*up.parameters(), *down.parameters()):
            parameter.normal_(generator=generator)
    return up, down


def through(up: nn.Module, down: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(what comes out, the gradient of what went in)."""
    x = torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5).requires_grad_()
    y = down(up(x).tanh())
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def parallel_pair(ranks: Ranks) -> dict[str, Any]:
    ranks = arranged(ranks, ranks.world_size, 1)
    up, down = plain_pair()
    column_parallel(up, (8,), ranks)
    parallel_down = RowParallel(down, ranks)
    y, dx = through(up, parallel_down)
    result = {"y": y, "dx": dx, "down.bias": parallel_down.bias.grad}
    for name, parameter in {"up.weight": up.weight, "up.bias": up.bias, "down.weight": parallel_down.weight}.items():
        shard = shard_of(parameter)
        assert shard is not None
        assert parameter.grad is not None
        result[name] = shard.join(gather(parameter.grad, ranks.tp_group))
    return {name: value.numpy() for name, value in result.items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_pair_of_parallel_layers_is_the_plain_pair_forward_and_backward(ranks):
    up, down = plain_pair()
    y, dx = through(up, down)
    expected = {"y": y, "dx": dx, "down.bias": down.bias.grad}
    expected |= {"up.weight": up.weight.grad, "up.bias": up.bias.grad, "down.weight": down.weight.grad}
    for outcome in run_on_ranks(ranks, parallel_pair):
        for name, value in expected.items():
            assert value is not None
            torch.testing.assert_close(torch.from_numpy(outcome[name]), value, msg=name)


def check_operator(ranks: Ranks) -> dict[str, str]:
    group = arranged(ranks, 2, 1).tp_group.group_name
    strided = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(sum_over(strided, group), 2 * strided)
    return torch.library.opcheck(
        sum_over, (strided.requires_grad_(), group), test_utils=("test_schema", "test_faketensor")
    )


def test_the_sum_over_a_group_is_an_operator_that_a_compiler_sees_through():
    passed = {"test_schema": "SUCCESS", "test_faketensor": "SUCCESS"}
    assert run_on_ranks(2, check_operator) == [passed, passed]
