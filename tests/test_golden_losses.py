"""Golden losses: 20 steps of each form of the model, native, fp32, on the CPU.

A refactor leaves the files in tests/golden/ as they are. Where a change is meant to move them, write them anew with

    python -m tests.test_golden_losses

and say in the change why they moved.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import build_engine
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks

GOLDEN = Path(__file__).parent / "golden"
STEPS = 20
MODELS = {
    "gpt_neox": ModelConfig(vocab_size=256, hidden_size=64, num_layers=2, num_attention_heads=4),
    "llama": ModelConfig(
        form="llama",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
    ),
}


def batch(step: int) -> np.ndarray:
    """Eight random walks over the vocabulary, int64 [8, 33]: the next token is near the last one."""
    rng = np.random.Generator(np.random.Philox(key=[2024, step]))
    return rng.integers(0, 256, (8, 1)) + rng.integers(1, 4, (8, 33)).cumsum(1) & 255


def losses(form: str) -> list[float]:
    engine = build_engine(
        build_model(MODELS[form], seed=42),
        engine=EngineConfig(micro_batch_size=4, loss_chunk=50),
        optimizer=OptimizerConfig(eps=1e-6),
        ranks=Ranks(),
    )
    return [engine.step(batch(step), 2e-3).loss for step in range(STEPS)]


@pytest.mark.parametrize("form", MODELS)
def test_losses_are_the_golden_ones(form):
    golden = json.loads((GOLDEN / f"{form}.json").read_text())
    assert golden[-1] < golden[0] - 0.8
    np.testing.assert_allclose(losses(form), golden, rtol=1e-5)


@pytest.mark.parametrize("form", MODELS)
def test_two_runs_on_one_machine_give_the_same_losses_to_the_last_bit(form):
    assert losses(form) == losses(form)


if __name__ == "__main__":
    for name in MODELS:
        (GOLDEN / f"{name}.json").write_text(json.dumps(losses(name), indent=1) + "\n")
