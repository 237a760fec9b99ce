"""Tensor and sequence parallelism, through the engine: what they train is what one process trains."""

import gc
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import build_engine
from megacl.errors import LaunchError
from megacl.memory import estimate_memory
from megacl.model.config import LinearRope, ModelConfig
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from tests.ranks import arranged, run_on_ranks
from tests.test_engine import (
    STAGES,
    Outcome,
    arrays,
    assert_close,
    batch,
    make_engine,
    restore,
    train,
    train_fp16,
    train_native,
)

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
OTHERS = {
    "one after the other": replace(NEOX, parallel_residual=False, gelu="tanh", attention_bias="qkv", mlp_bias=False),
    "biases and wide heads": replace(
        LLAMA,
        tie_embeddings=False,
        head_dim=12,
        attention_bias="all",
        mlp_bias=True,
        rope_scaling=LinearRope(kind="linear", factor=2.0),
    ),
}


def train_in_groups(ranks: Ranks, tp: int, sp: int, *args: Any, **settings: Any) -> Outcome:
    ranks = arranged(ranks, tp, sp)
    return train(ranks, *args, kind="deepspeed", tensor_parallel=tp, sequence_parallel=sp, **settings)


def train_parallel(world: int, *args: Any, tp: int = 1, sp: int = 1, **settings: Any) -> Outcome:
    """`train` on ranks in such groups, which must agree on what they report."""
    outcomes = run_on_ranks(world, train_in_groups, tp, sp, *args, **settings)
    for outcome in outcomes:
        assert (outcome.losses, outcome.norms) == (outcomes[0].losses, outcomes[0].norms)
    return outcomes[0]


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    """What one process trains of each model."""
    return {name: train_native(model=model) for name, model in {**MODELS, **OTHERS}.items()}


QUICK = [
    ("neox", 2, {"tp": 2, "zero_stage": 1}),
    ("llama", 2, {"tp": 2, "zero_stage": 3}),
    ("neox", 2, {"sp": 2, "zero_stage": 3}),
    ("llama", 2, {"sp": 2, "zero_stage": 0}),
    ("one after the other", 2, {"tp": 2, "zero_stage": 2}),
    ("biases and wide heads", 2, {"tp": 2, "zero_stage": 1}),
]
MATRIX = [
    (name, world, {**groups, "zero_stage": stage})
    for name in (*MODELS, *OTHERS)
    for world, groups in [
        (2, {"tp": 2}),
        (2, {"sp": 2}),
        (4, {"tp": 2}),
        (4, {"sp": 2}),
        (4, {"tp": 4}),
        (4, {"sp": 4}),
        (4, {"tp": 2, "sp": 2}),
    ]
    for stage in STAGES
]


@pytest.mark.parametrize(
    ("name", "world", "groups"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.long) for each in MATRIX)], ids=str
)
def test_ranks_in_groups_train_as_one_process(name, world, groups, alone):
    outcome = train_parallel(world, model={**MODELS, **OTHERS}[name], **groups)
    assert_close(outcome, alone[name])
    assert outcome.nats_at_start == pytest.approx(alone[name].nats_at_start, rel=1e-6)


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
@pytest.mark.parametrize("groups", [{"tp": 2}, {"sp": 2}], ids=str)
def test_documents_padding_micro_batches_and_checkpointing_train_alike_in_groups(groups, checkpointing):
    how = {
        "model": OTHERS["biases and wide heads"] if checkpointing == "selective" else LLAMA,
        "document_end": 7,
        "padded": True,
    }
    expected = train_native(range(5), **how)
    settings = {"micro_batch_size": 2, "loss_chunk": 5, "activation_checkpointing": checkpointing, "zero_stage": 2}
    assert_close(train_parallel(2, range(5), **groups, **how, **settings), expected)


def test_a_state_moves_between_groups_and_one_process(alone):
    """Tensor parallel with ZeRO-3, one process, sequence parallel with ZeRO-1, tensor parallel with ZeRO-0."""
    first = train_parallel(4, range(5), model=LLAMA, tp=2, zero_stage=3)
    second = train_native(range(5, 10), model=LLAMA, go_on_from=first)
    third = train_parallel(2, range(10, 15), model=LLAMA, go_on_from=second, sp=2, zero_stage=1)
    last = train_parallel(2, range(15, 20), model=LLAMA, go_on_from=third, tp=2, zero_stage=0)
    last.losses = first.losses + second.losses + third.losses + last.losses
    last.norms = first.norms + second.norms + third.norms + last.norms
    last.applied = [True] * 20
    assert_close(last, alone["llama"])


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_imported_into_groups_is_exported_unchanged(stage):
    before = train_native(range(3), model=LLAMA)
    after = train_parallel(2, range(0), model=LLAMA, go_on_from=before, tp=2, zero_stage=stage)
    for name, state in before.state.items():
        for key, value in state.items():
            np.testing.assert_array_equal(after.state[name][key], value, err_msg=f"{name} {key}")


def initial_weights(ranks: Ranks, device: str, **settings: Any) -> dict[str, np.ndarray]:
    ranks = arranged(ranks, 2, 1)
    engine = build_engine(
        build_model(NEOX, seed=1, device=device),
        engine=EngineConfig(kind="deepspeed", tensor_parallel=2, **settings),
        optimizer=OptimizerConfig(),
        ranks=ranks,
    )
    owners = {name: index % 2 for index, name in enumerate(engine.shapes)}
    return {name: state["weight"].numpy() for name, state in engine.export_state(owners) if state}


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("cpu", {"zero_stage": 1}),
        ("meta", {"zero_stage": 0}),
        ("meta", {"zero_stage": 3}),
        ("meta", {"zero_stage": 2, "precision": "bf16"}),
    ],
    ids=str,
)
def test_initial_weights_are_those_of_the_whole_model(device, settings):
    whole = build_model(NEOX, seed=1).state_dict()
    first, second = run_on_ranks(2, initial_weights, device, **settings)
    assert not first.keys() & second.keys()
    weights = {**first, **second}
    assert set(weights) == set(whole)
    for name, value in whole.items():
        np.testing.assert_array_equal(weights[name], value.numpy(), err_msg=name)


@pytest.mark.parametrize("groups", [{"tp": 2}, {"sp": 2}], ids=str)
def test_bf16_in_groups_follows_fp32(groups, alone):
    outcome = train_parallel(2, range(10), model=LLAMA, precision="bf16", zero_stage=1, **groups)
    np.testing.assert_allclose(outcome.losses, alone["llama"].losses[:10], rtol=5e-3)


def train_fp16_in_groups(ranks: Ranks, tp: int, sp: int, *args: Any, **settings: Any) -> Outcome:
    ranks = arranged(ranks, tp, sp)
    return train_fp16(ranks, *args, kind="deepspeed", tensor_parallel=tp, sequence_parallel=sp, **settings)


@pytest.mark.parametrize(("tp", "sp", "stage"), [(2, 1, 1), (2, 1, 3), (1, 2, 2)])
def test_fp16_in_groups_skips_overflows_on_all_ranks_and_follows_fp32(tp, sp, stage, alone):
    before = Outcome(state=train_native(range(0), model=LLAMA).state, loss_scale=(2.0**40, 0))
    for outcome in run_on_ranks(
        2, train_fp16_in_groups, tp, sp, range(2), model=LLAMA, zero_stage=stage, go_on_from=before
    ):
        assert outcome.applied == [False, False]
        assert outcome.loss_scale is not None
        assert outcome.loss_scale[0] < 2.0**40
    before.loss_scale = (1024.0, 0)
    for outcome in run_on_ranks(
        2, train_fp16_in_groups, tp, sp, range(5), model=LLAMA, zero_stage=stage, go_on_from=before
    ):
        assert outcome.applied == [True] * 5
        np.testing.assert_allclose(outcome.losses, alone["llama"].losses[:5], rtol=5e-3)


class HoldingOn(TorchDispatchMode):
    """Holds on to what collectives take and give, in `held`.

    What gloo's thread is the last to let go of is freed there, and the profiler's record has only what this thread
    frees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator.namespace in ("c10d", "megacl"):  # megacl::sum_over makes what it sends
            self.held.append((args, result))
        return result


def kept_after_forward(ranks: Ranks, model: ModelConfig, engine: EngineConfig) -> int:
    """Bytes that a forward pass of 4 x 64 tokens leaves allocated, by the profiler's record."""
    ranks = arranged(ranks, engine.tensor_parallel, engine.sequence_parallel)
    built = build_model(model, seed=0)
    build_engine(built, engine=engine, optimizer=OptimizerConfig(), ranks=ranks)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (4, 64)))
    built(tokens, tokens)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        with HoldingOn() as collectives:
            sums = built(tokens, tokens)
        assert collectives.held
        time.sleep(0.5)  # until gloo's thread has let go
        collectives.held.clear()
    assert sums.requires_grad
    events = record.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("checkpointing", ["none", pytest.param("selective", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["neox", pytest.param("llama", marks=pytest.mark.long)])
@pytest.mark.parametrize("groups", [{"tensor_parallel": 2}, {"sequence_parallel": 2}], ids=str)
def test_a_rank_in_a_group_keeps_what_was_estimated(groups, name, checkpointing):
    """Of a sum over ranks and the products that it is of, selective checkpointing keeps the sum alone."""
    engine = EngineConfig(kind="deepspeed", activation_checkpointing=checkpointing, loss_chunk=64, **groups)
    said = estimate_memory(MODELS[name], engine, seq_length=64, micro_batch_size=4, ranks=2, device="cpu").kept
    for bytes_kept in run_on_ranks(2, kept_after_forward, MODELS[name], engine):
        assert bytes_kept == pytest.approx(said, rel=0.05)


def step_above(ranks: Ranks, tp: int, sp: int, stage: int) -> tuple[Any, bool]:
    """A step whose loss is above the limit: its result, and whether all weights are as before."""
    settings = {"kind": "deepspeed", "zero_stage": stage, "tensor_parallel": tp, "sequence_parallel": sp}
    ranks = arranged(ranks, tp, sp)
    engine = make_engine(ranks, NEOX, **settings)
    before = {name: state["weight"] for name, state in engine.export_state() if state}
    rows = 8 // ranks.dp_size
    result = engine.step(batch(0)[ranks.dp_rank * rows : (ranks.dp_rank + 1) * rows], 1e-3, skip_above=1.0)
    return result, all(torch.equal(state["weight"], before[name]) for name, state in engine.export_state() if state)


def poisoned_step(ranks: Ranks, before: Outcome, stage: int) -> tuple[Any, bool]:
    """A step whose gradient is not finite in what one rank has of a layer."""
    engine = make_engine(arranged(ranks, 2, 1), LLAMA, kind="deepspeed", zero_stage=stage, tensor_parallel=2)
    restore(engine, before)
    if ranks.rank == 1:
        shard = engine._model.layers[0].mlp.gate_up.weight
        shard.register_hook(lambda gradient: gradient * torch.inf)
    result = engine.step(batch(0), 1e-3)
    after = arrays(engine)
    return result, all(
        np.array_equal(state["weight"], before.state[name]["weight"]) for name, state in after.items() if state
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_on_one_rank_of_a_group_stops_the_update_on_all(stage):
    before = train_native(range(2), model=LLAMA)
    for result, unchanged in run_on_ranks(2, poisoned_step, before, stage):
        assert np.isfinite(result.loss)
        assert not np.isfinite(result.grad_norm)
        assert not result.applied
        assert unchanged


@pytest.mark.parametrize(("tp", "sp", "stage"), [(2, 1, 0), (2, 1, 2), (1, 2, 3)])
def test_an_update_is_skipped_in_groups_as_alone(tp, sp, stage):
    for result, unchanged in run_on_ranks(2, step_above, tp, sp, stage):
        assert not result.applied
        assert unchanged


def last_logits(ranks: Ranks, tp: int, sp: int) -> np.ndarray | str:
    engine = make_engine(arranged(ranks, tp, sp), LLAMA, kind="deepspeed", tensor_parallel=tp, sequence_parallel=sp)
    try:
        return engine.logits(batch(0)).numpy()
    except LaunchError as error:
        return str(error)


def test_logits_are_whole_where_layers_are_shared_and_refused_where_sequences_are():
    expected = build_model(LLAMA, seed=1)(torch.from_numpy(batch(0)), last_only=True)[:, 0].detach().numpy()
    for logits in run_on_ranks(2, last_logits, 2, 1):
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    refused = "logits are computed of whole sequences; set engine.sequence_parallel=1."
    assert run_on_ranks(2, last_logits, 1, 2) == [refused] * 2


def choices(ranks: Ranks, tp: int, sp: int) -> list[str]:
    engine = make_engine(arranged(ranks, tp, sp), NEOX, kind="deepspeed", tensor_parallel=tp, sequence_parallel=sp)
    return [f"{choice.op}: {choice.implementation}, {choice.why}" for choice in engine.choices]


def test_the_table_of_kernels_names_those_that_run_over_groups():
    assert "linear_cross_entropy: by vocabulary, 2 ranks share it" in run_on_ranks(2, choices, 2, 1)[0]
    said = "attention: ulysses, sdpa, 2 ranks share each sequence; PyTorch's kernel for the device"
    assert said in run_on_ranks(2, choices, 1, 2)[0]


def test_ranks_that_are_not_arranged_for_the_engine_are_a_mistake():
    with pytest.raises(ValueError, match="tensor_parallel 2, sequence_parallel 1"):
        make_engine(Ranks(), NEOX, kind="deepspeed", tensor_parallel=2)


@pytest.mark.long
@pytest.mark.parametrize("name", ["neox", *OTHERS])
@pytest.mark.parametrize("groups", [{"tp": 2}, {"sp": 2}], ids=str)
def test_compiled_layers_train_alike_in_groups(groups, name, alone):
    outcome = train_parallel(2, range(5), model={**MODELS, **OTHERS}[name], compile=True, zero_stage=1, **groups)
    np.testing.assert_allclose(outcome.losses, alone[name].losses[:5], rtol=1e-5)
    np.testing.assert_allclose(outcome.norms, alone[name].norms[:5], rtol=1e-4)
