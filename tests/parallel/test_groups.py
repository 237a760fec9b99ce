"""Ranks in groups: who shares layers, who shares sequences, and over whom gradients are averaged."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import build_engine
from megacl.errors import LaunchError
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from tests.ranks import SECONDS, arranged, run_on_fresh_ranks, run_on_ranks


def members(group: Any) -> list[int] | None:
    """The ranks of a group, as they tell one another."""
    if group is None:
        return None
    heard = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(heard, torch.tensor(dist.get_rank()), group=group)
    return [int(rank) for rank in heard]


def place(ranks: Ranks, tp: int, sp: int) -> tuple[Any, ...]:
    ranks = arranged(ranks, tp, sp)
    sizes = (ranks.tp_size, ranks.sp_size, ranks.dp_size, ranks.replica_size)
    places = (ranks.tp_rank, ranks.sp_rank, ranks.dp_rank)
    return sizes, places, tuple(map(members, (ranks.tp_group, ranks.sp_group, ranks.replica_group)))


@pytest.mark.parametrize(
    ("tp", "sp", "expected"),
    [
        (1, 1, [((1, 1, 4, 4), (0, 0, r), (None, None, None)) for r in range(4)]),
        (
            2,
            1,
            [
                ((2, 1, 2, 2), (0, 0, 0), ([0, 1], None, [0, 2])),
                ((2, 1, 2, 2), (1, 0, 0), ([0, 1], None, [1, 3])),
                ((2, 1, 2, 2), (0, 0, 1), ([2, 3], None, [0, 2])),
                ((2, 1, 2, 2), (1, 0, 1), ([2, 3], None, [1, 3])),
            ],
        ),
        (
            1,
            2,
            [
                ((1, 2, 2, 4), (0, 0, 0), (None, [0, 1], None)),
                ((1, 2, 2, 4), (0, 1, 0), (None, [0, 1], None)),
                ((1, 2, 2, 4), (0, 0, 1), (None, [2, 3], None)),
                ((1, 2, 2, 4), (0, 1, 1), (None, [2, 3], None)),
            ],
        ),
        (
            2,
            2,
            [
                ((2, 2, 1, 2), (0, 0, 0), ([0, 1], [0, 2], [0, 2])),
                ((2, 2, 1, 2), (1, 0, 0), ([0, 1], [1, 3], [1, 3])),
                ((2, 2, 1, 2), (0, 1, 0), ([2, 3], [0, 2], [0, 2])),
                ((2, 2, 1, 2), (1, 1, 0), ([2, 3], [1, 3], [1, 3])),
            ],
        ),
        (4, 1, [((4, 1, 1, 1), (r, 0, 0), ([0, 1, 2, 3], None, [r])) for r in range(4)]),
    ],
)
def test_four_ranks_fall_into_groups_by_layers_then_sequences_then_data(tp, sp, expected):
    assert run_on_ranks(4, place, tp, sp) == expected


@pytest.mark.parametrize(("world", "tp", "sp"), [(4, 3, 1), (2, 2, 2), (1, 1, 2)])
def test_sizes_that_do_not_divide_the_ranks_are_refused(world, tp, sp):
    with pytest.raises(LaunchError) as error:
        Ranks(0, world).arrange(tensor_parallel=tp, sequence_parallel=sp)
    assert str(error.value) == (
        f"the number of ranks is {world}; it must be a multiple of engine.tensor_parallel, {tp}, x "
        f"engine.sequence_parallel, {sp}."
    )


def patience(ranks: Ranks, tp: int, sp: int) -> set[float]:
    """How long collectives wait in the groups of a run, those that DeepSpeed averages gradients over among them."""
    ranks = ranks.arrange(tensor_parallel=tp, sequence_parallel=sp)
    config = EngineConfig(kind="deepspeed", zero_stage=1, tensor_parallel=tp, sequence_parallel=sp)
    model = build_model(ModelConfig(vocab_size=64, hidden_size=32, num_layers=1, num_attention_heads=4), seed=1)
    engine: Any = build_engine(model, engine=config, optimizer=OptimizerConfig(), ranks=ranks)
    groups = [ranks.tp_group, ranks.sp_group, ranks.replica_group, *engine._deepspeed.optimizer.real_dp_process_group]
    cpu = torch.device("cpu")
    return {group._get_backend(cpu).options._timeout.total_seconds() for group in groups if group is not None}


@pytest.mark.parametrize(
    ("tp", "sp"), [(1, 1), *(pytest.param(*each, marks=pytest.mark.long) for each in [(2, 1), (1, 2)])]
)
def test_a_silent_rank_is_missed_as_soon_in_every_group(tp, sp):
    assert run_on_fresh_ranks(2, patience, tp, sp) == [{SECONDS}, {SECONDS}]
