"""Replicas that differ by one bit are found, and the rank that has others is named."""

from typing import Any

import hypothesis.extra.numpy
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import build_engine
from megacl.engine.replicas import checksum
from megacl.errors import DivergedError
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from tests.ranks import arranged, run_on_ranks

MODEL = ModelConfig(vocab_size=258, hidden_size=48, num_layers=2, num_attention_heads=4)
NORM, CUT = "layers.1.attention_norm.weight", "layers.1.mlp.up.weight"
TOKENS = np.random.Generator(np.random.Philox(5)).integers(0, 257, (2, 9))


@torch.no_grad()
def nudge(parameter: torch.Tensor) -> None:
    """One element of the weight, to the next number in its own precision."""
    bits = parameter.view({2: torch.int16, 4: torch.int32}[parameter.itemsize])
    bits.flatten()[-1] += 1


def train(
    ranks: Ranks, nudged: int | None, *, every: int = 2, exports: bool = False, weight: str = NORM, **settings: Any
) -> str:
    """Three steps; after the second a rank's weight is nudged. What the run says at its end."""
    ranks = arranged(ranks, settings.get("tensor_parallel", 1), 1)
    model = build_model(MODEL, seed=1, device="meta")
    config = EngineConfig(kind="deepspeed", compare_replicas_every=every, **settings)
    engine = build_engine(model, engine=config, optimizer=OptimizerConfig(), ranks=ranks)
    try:
        for step in range(3):
            engine.step(TOKENS, 1e-3)
            if step == 1 and ranks.rank == nudged:
                nudge(model.get_parameter(weight))
        if exports:
            list(engine.export_state())
    except DivergedError as error:
        return str(error)
    return f"trained {engine.optimizer_step}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_replicas_that_are_alike_train_on(stage):
    assert run_on_ranks(2, train, None, zero_stage=stage, exports=True) == ["trained 3", "trained 3"]


@pytest.mark.parametrize("settings", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 1, "precision": "bf16"}])
def test_of_two_ranks_that_differ_in_one_bit_both_are_named(settings):
    for said in run_on_ranks(2, train, 1, **settings):
        assert said.startswith("the replicas of the weights differ: layers.1.attention_norm.weight on rank 0, 1 ")


def test_of_four_ranks_the_one_that_differs_is_named_on_every_rank():
    for said in run_on_ranks(4, train, 2, zero_stage=1):
        assert said.startswith(
            "the replicas of the weights differ: layers.1.attention_norm.weight on rank 2 is not what"
        )


def test_what_zero_3_keeps_whole_is_compared_too():
    for said in run_on_ranks(2, train, 0, zero_stage=3):
        assert "layers.1.attention_norm.weight" in said


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_a_tensor_parallel_group_holds_whole_is_compared_within_it(stage):
    settings = {"zero_stage": stage, "tensor_parallel": 2}
    assert run_on_ranks(2, train, None, **settings) == ["trained 3", "trained 3"]
    for said in run_on_ranks(2, train, 1, **settings):
        assert said.startswith(f"the replicas of the weights differ: {NORM} on rank 0, 1 is different on each")


def test_parts_of_a_weight_are_compared_with_the_same_parts_alone():
    assert run_on_ranks(2, train, 1, weight=CUT, zero_stage=0, tensor_parallel=2) == ["trained 3", "trained 3"]
    for said in run_on_ranks(4, train, 1, weight=CUT, zero_stage=0, tensor_parallel=2):
        assert said.startswith(f"the replicas of the weights differ: {CUT} on rank 1, 3 is different on each")


def test_nothing_is_exported_of_replicas_that_differ():
    for said in run_on_ranks(2, train, 1, zero_stage=0, every=1000, exports=True):
        assert "layers.1.attention_norm.weight" in said


FLOATS = hypothesis.extra.numpy.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32))


@given(values=FLOATS, data=st.data())
def test_a_checksum_is_another_where_one_bit_is(values, data):
    tensor = torch.from_numpy(values.copy())
    before = checksum(tensor)
    place, bit = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, 31))
    bits = values.view(np.uint32)
    bits[place] ^= np.uint32(1 << bit)
    assert checksum(torch.from_numpy(values)) != before


def test_a_checksum_knows_places_and_runs_over_its_chunks():
    tensor = torch.arange(2**20 + 3, dtype=torch.float32)
    swapped = tensor.clone()
    swapped[[5, 2**20 + 1]] = swapped[[2**20 + 1, 5]]
    assert checksum(tensor) != checksum(swapped)
    bits = tensor.numpy().view(np.int32).astype(np.int64)
    with np.errstate(over="ignore"):
        assert checksum(tensor).item() == (bits * (2 * np.arange(len(bits)) + 1)).sum()
