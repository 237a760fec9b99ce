"""Tensor and sequence parallelism, through the engine: what they train is what one process trains."""

from typing import Any

import pytest

from megacl.model.config import ModelConfig
from megacl.parallel.ranks import Ranks
from tests.ranks import arranged, run_on_ranks
from tests.test_engine import Outcome, assert_close, train, train_native

NEOX = ModelConfig(vocab_size=2224, hidden_size=48, num_layers=2, num_attention_heads=4, qk_norm="layer_norm")
LLAMA = ModelConfig(
    form="llama",
    vocab_size=2224,
    hidden_size=64,
    intermediate_size=52,
    num_layers=2,
    num_attention_heads=8,
    num_kv_heads=4,
    tie_embeddings=True,
    qk_norm="rms_norm",
)
MODELS = {"neox": NEOX, "llama": LLAMA}


def train_in_groups(ranks: Ranks, tp: int, sp: int, *args: Any, **settings: Any) -> Outcome:
    ranks = arranged(ranks, tp, sp)
    return train(ranks, *args, kind="deepspeed", tensor_parallel=tp, sequence_parallel=sp, **settings)


def train_parallel(world_size: int, *args: Any, tp: int = 1, sp: int = 1, **settings: Any) -> Outcome:
    """`train` on ranks in such groups, which must agree on what they report."""
    outcomes = run_on_ranks(world_size, train_in_groups, tp, sp, *args, **settings)
    for outcome in outcomes:
        assert (outcome.losses, outcome.norms) == (outcomes[0].losses, outcomes[0].norms)
    return outcomes[0]


@pytest.fixture(scope="module", params=MODELS)
def alone(request: pytest.FixtureRequest) -> tuple[ModelConfig, Outcome]:
    model = MODELS[request.param]
    return model, train_native(model=model)


def assert_equal_to(alone: tuple[ModelConfig, Outcome], world_size: int, **settings: Any) -> None:
    model, expected = alone
    outcome = train_parallel(world_size, model=model, **settings)
    assert_close(outcome, expected)
    assert outcome.nats_at_start == pytest.approx(expected.nats_at_start, rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_that_share_each_layer_train_as_one_process(stage, alone):
    assert_equal_to(alone, 2, tp=2, zero_stage=stage)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_that_share_each_sequence_train_as_one_process(stage, alone):
    assert_equal_to(alone, 2, sp=2, zero_stage=stage)
