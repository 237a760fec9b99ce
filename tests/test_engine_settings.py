"""Settings that save memory: they change where things are kept and what is computed twice, and no loss."""

import numpy as np
import pytest

from tests.parallel.test_apply import LLAMA as PARALLEL
from tests.parallel.test_apply import train_parallel
from tests.ranks import run_on_ranks
from tests.test_engine import (
    LLAMA,
    NEOX,
    Outcome,
    assert_close,
    poisoned_step,
    train_native,
    train_zero,
)


@pytest.fixture(scope="module")
def undisturbed() -> Outcome:
    return train_native(range(8))


def assert_same_state(outcome: Outcome, expected: Outcome) -> None:
    for name, state in expected.state.items():
        for key, value in state.items():
            np.testing.assert_array_equal(outcome.state[name][key], value, err_msg=f"{name} {key}")


# ------------------------------------------------------------------------------------------------ ZeRO-Offload


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_on_the_host_gives_the_losses_of_native(stage, micro_batch_size, undisturbed):
    settings = {"offload_optimizer": True, "micro_batch_size": micro_batch_size}
    assert_close(train_zero(stage, range(8), **settings), undisturbed)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_state_moves_to_an_optimizer_on_the_host_and_back(stage, undisturbed):
    first_half = train_zero(stage, range(4), offload_optimizer=True)
    rest = train_native(range(4, 8), go_on_from=first_half)
    np.testing.assert_allclose(first_half.losses + rest.losses, undisturbed.losses, rtol=1e-5)
    before = train_native(range(4))
    assert_same_state(train_zero(stage, range(0), go_on_from=before, offload_optimizer=True), before)
    back = train_zero(stage, range(4, 8), go_on_from=before, offload_optimizer=True)
    np.testing.assert_allclose(back.losses, undisturbed.losses[4:], rtol=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_on_the_host_skips_what_is_not_finite(stage):
    before = train_native(range(2))
    before.state["layers.1.mlp.down.weight"]["weight"][:] = 1e38
    settings = {"kind": "deepspeed", "zero_stage": stage, "offload_optimizer": True}
    result, state, updates = run_on_ranks(2, poisoned_step, before, **settings)[0]
    assert not result.applied
    assert updates == 2
    np.testing.assert_array_equal(state["head.weight"]["weight"], before.state["head.weight"]["weight"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_on_the_host_steps_bf16_weights(stage):
    here = train_zero(stage, range(5), precision="bf16", micro_batch_size=2)
    host = train_zero(stage, range(5), precision="bf16", micro_batch_size=2, offload_optimizer=True)
    np.testing.assert_allclose(host.losses, here.losses, rtol=2e-3)
    assert host.optimizer_step == 5


# ---------------------------------------------------------------------------------------- activation checkpointing

CHOICES = ["full", "selective", (1,), (0, 1)]


@pytest.mark.parametrize("model", [NEOX, LLAMA], ids=["gpt_neox", "llama"])
@pytest.mark.parametrize("document_end", [None, 7], ids=["plain", "documents"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_what_is_computed_again_has_the_same_bits(choice, document_end, model):
    expected = train_native(range(3), model=model, document_end=document_end)
    outcome = train_native(range(3), model=model, document_end=document_end, activation_checkpointing=choice)
    assert outcome.losses == expected.losses
    assert_same_state(outcome, expected)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_computed_again_under_zero_has_the_same_bits(stage, choice):
    expected = train_zero(stage, range(3), micro_batch_size=2)
    outcome = train_zero(stage, range(3), activation_checkpointing=choice, micro_batch_size=2)
    np.testing.assert_allclose(outcome.losses, expected.losses, rtol=1e-6)


@pytest.mark.parametrize("choice", ["full", "selective"])
def test_what_is_computed_again_under_autocast_has_the_same_bits(choice):
    expected = train_native(range(3), precision="bf16")
    outcome = train_native(range(3), precision="bf16", activation_checkpointing=choice)
    assert outcome.losses == expected.losses
    assert_same_state(outcome, expected)


@pytest.mark.long
@pytest.mark.parametrize("choice", ["full", "selective"])
def test_compiled_layers_are_computed_again_with_the_same_losses(choice, undisturbed):
    outcome = train_native(range(3), compile=True, activation_checkpointing=choice)
    np.testing.assert_allclose(outcome.losses, undisturbed.losses[:3], rtol=1e-5)


@pytest.mark.parametrize("choice", ["full", "selective"])
@pytest.mark.parametrize("groups", [{"tp": 2}, {"sp": 2}], ids=str)
def test_what_is_computed_again_in_groups_gives_the_same_losses(groups, choice):
    expected = train_parallel(2, range(3), model=PARALLEL, zero_stage=3, **groups)
    outcome = train_parallel(2, range(3), model=PARALLEL, zero_stage=3, activation_checkpointing=choice, **groups)
    assert_close(outcome, expected)


def test_replicas_of_each_part_of_the_layers_are_compared_apart():
    outcome = train_parallel(4, range(3), model=PARALLEL, zero_stage=1, tp=2, compare_replicas_every=1)
    assert_close(outcome, train_native(range(3), model=PARALLEL))
