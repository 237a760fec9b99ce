"""Settings that save memory: they change where things are kept and what is computed twice, and no loss."""

import math
from typing import Any

import numpy as np
import pytest

from megacl.engine import StepResult
from megacl.parallel.ranks import Ranks
from tests.parallel.test_apply import LLAMA as PARALLEL
from tests.parallel.test_apply import train_parallel
from tests.ranks import run_on_ranks
from tests.test_engine import (
    LLAMA,
    NEOX,
    ROWS,
    Outcome,
    State,
    arrays,
    assert_close,
    batch,
    let_deepspeed_run_fp16,
    make_engine,
    poisoned_step,
    restore,
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


# ------------------------------------------------------------------------------------------------ skipped updates


def train_past_one(ranks: Ranks, skipped: bool, **settings: Any) -> tuple[list[bool], State]:
    """Two updates, with one between them whose loss is above what is borne, or without."""
    engine = make_engine(ranks, micro_batch_size=2, **settings)
    rows = ROWS // ranks.world_size
    mine = slice(ranks.rank * rows, (ranks.rank + 1) * rows)
    applied = []
    for step, bearable in ((0, math.inf), (1, 0.0), (2, math.inf)):
        if skipped or bearable:
            applied.append(engine.step(batch(step)[mine], 1e-3, skip_above=bearable).applied)
    return applied, arrays(engine)


@pytest.mark.parametrize("settings", [{}, {"offload_optimizer": True}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_nothing_is_left_of_an_update_that_was_skipped(stage, settings):
    if stage is None:
        runs = [train_past_one(Ranks(), skipped) for skipped in (True, False)]
    else:
        zero = {"kind": "deepspeed", "zero_stage": stage, **(settings if stage else {})}
        runs = [run_on_ranks(2, train_past_one, skipped, **zero)[0] for skipped in (True, False)]
    assert runs[0][0] == [True, False, True]
    np.testing.assert_equal(runs[0][1], runs[1][1])


def scale_after_a_spike(
    ranks: Ranks, before: Outcome, stage: int | None
) -> tuple[StepResult, tuple[float, int] | None, State]:
    """A step in fp16 whose loss is above what is borne."""
    if stage is None:
        engine = make_engine(ranks, precision="fp16")
    else:
        let_deepspeed_run_fp16()
        engine = make_engine(ranks, precision="fp16", kind="deepspeed", zero_stage=stage)
    restore(engine, before)
    rows = ROWS // ranks.world_size
    result = engine.step(batch(1)[ranks.rank * rows : (ranks.rank + 1) * rows], 1e-3, skip_above=0.0)
    return result, engine.loss_scale, arrays(engine)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**40, 1.0], ids=["as it is", "overflowing", "the smallest"])
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_a_spike_leaves_the_loss_scale_alone(stage, scale):
    before = Outcome(state=train_native(range(2)).state, loss_scale=(scale, 5))
    if stage is None:
        runs = [scale_after_a_spike(Ranks(), before, stage)]
    else:
        runs = run_on_ranks(2, scale_after_a_spike, before, stage)
    for result, loss_scale, _ in runs:
        assert not result.applied
        assert loss_scale == (scale, 5)
    np.testing.assert_equal(runs[0][2], before.state)  # rank 0 has all of it


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
    before = train_native(range(1))
    for name, state in before.state.items():  # biases begin at zero, which would hide one that is added twice
        if name.endswith("bias"):
            state["weight"][:] = np.random.Generator(np.random.Philox(7)).normal(size=state["weight"].shape)
    expected = train_zero(stage, range(3), go_on_from=before, micro_batch_size=2)
    outcome = train_zero(stage, range(3), go_on_from=before, activation_checkpointing=choice, micro_batch_size=2)
    assert outcome.losses == expected.losses
    assert_same_state(outcome, expected)


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
