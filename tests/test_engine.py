"""Both engines, one arithmetic: native on one process against ZeRO 0 to 3 on two gloo ranks."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacl import kernels
from megacl.config import EngineConfig, OptimizerConfig
from megacl.data.packing import PADDING
from megacl.engine import Engine, build_engine
from megacl.errors import CheckpointError, LaunchError
from megacl.model.config import ModelConfig, MupConfig
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from tests.ranks import run_on_ranks

# Odd sizes, which no number of ranks divides; the embedding is large enough for ZeRO-3 to keep it in pieces, the rest
# small enough for it to keep whole.
NEOX = ModelConfig(vocab_size=2223, hidden_size=45, num_layers=2, num_attention_heads=3)
LLAMA = ModelConfig(
    form="llama",
    vocab_size=2223,
    hidden_size=48,
    intermediate_size=51,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    tie_embeddings=True,
)
STAGES = [0, 1, 2, 3]
ROWS, LENGTH = 8, 12
# Part of the key bias has a gradient of zero but for rounding, which Adam would blow up with its usual epsilon.
OPTIMIZER = OptimizerConfig(max_grad_norm=1.5, eps=1e-6)

State = dict[str, dict[str, np.ndarray]]


def batch(step: int) -> np.ndarray:
    """The global batch of a step: the tokens of a small alphabet, so that there is something to learn."""
    return np.random.Generator(np.random.Philox([3, step])).integers(0, 50, (ROWS, LENGTH + 1))


def pad(tokens: np.ndarray) -> np.ndarray:
    """The batch with padding behind 12, 11, ..., 5 targets of its rows: each rank and micro batch has others."""
    tokens = tokens.copy()
    for row, line in enumerate(tokens):
        line[LENGTH + 1 - row :] = PADDING
    return tokens


def rate(step: int) -> float:
    return 1e-3 * (1 + step % 3)


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    nats_at_start: float = 0.0
    state: State = field(default_factory=dict)
    optimizer_step: int = 0
    loss_scale: tuple[float, int] | None = None


def make_engine(
    ranks: Ranks,
    model: ModelConfig = NEOX,
    optimizer: OptimizerConfig = OPTIMIZER,
    document_end: int | None = None,
    **settings: Any,
) -> Engine:
    built = build_model(model, seed=1, device="meta")
    built.document_end = document_end
    return build_engine(built, engine=EngineConfig(**settings), optimizer=optimizer, ranks=ranks)


def arrays(engine: Engine) -> State:
    return {name: {key: value.numpy() for key, value in state.items()} for name, state in engine.export_state()}


def restore(engine: Engine, before: Outcome) -> None:
    def load(name: str) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(value) for key, value in before.state[name].items()}

    engine.import_state(load, optimizer_step=before.optimizer_step, loss_scale=before.loss_scale)


def train(
    ranks: Ranks,
    steps: range = range(20),
    *,
    go_on_from: Outcome | None = None,
    reset_before: int | None = None,
    document_end: int | None = None,
    padded: bool = False,
    weight_decay: float | None = None,
    **settings: Any,
) -> Outcome:
    """Trains on this rank's slices; everything that a test compares is in the outcome."""
    engine = make_engine(ranks, document_end=document_end, **settings)
    if go_on_from is not None:
        restore(engine, go_on_from)
    rows = ROWS // ranks.dp_size
    mine = slice(ranks.dp_rank * rows, (ranks.dp_rank + 1) * rows)
    held_out = batch(1000)[mine]
    outcome = Outcome()
    nats = engine.nats(held_out[:, :-1], held_out[:, 1:])
    outcome.nats_at_start = float(ranks.sum(np.array([nats]))[0])
    for step in steps:
        if step == reset_before:
            engine.reset_optimizer()
        tokens = pad(batch(step)) if padded else batch(step)
        targets = int((tokens[:, 1:] != PADDING).sum()) if padded else None
        result = engine.step(tokens[mine], rate(step), targets=targets, weight_decay=weight_decay)
        outcome.losses.append(result.loss)
        outcome.norms.append(result.grad_norm)
        outcome.applied.append(result.applied)
    outcome.state = arrays(engine)
    outcome.optimizer_step = engine.optimizer_step
    outcome.loss_scale = engine.loss_scale
    return outcome


def train_zero(stage: int, *args: Any, **settings: Any) -> Outcome:
    """`train` with ZeRO on two ranks, which must agree on what they report."""
    first, second = run_on_ranks(2, train, *args, kind="deepspeed", zero_stage=stage, **settings)
    assert (first.losses, first.norms, first.applied) == (second.losses, second.norms, second.applied)
    return first


def train_native(*args: Any, **settings: Any) -> Outcome:
    return train(Ranks(), *args, **settings)


@pytest.fixture(scope="module")
def undisturbed() -> Outcome:
    return train_native()


def assert_close(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.applied == [True] * len(expected.losses)
    np.testing.assert_allclose(outcome.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(outcome.norms, expected.norms, rtol=1e-4)
    assert outcome.optimizer_step == expected.optimizer_step
    for name, state in expected.state.items():
        for key, value in state.items():
            np.testing.assert_allclose(outcome.state[name][key], value, atol=2e-4, err_msg=f"{name} {key}")


def test_the_reference_learns_and_clips(undisturbed):
    assert undisturbed.losses[-1] < undisturbed.losses[0] - 1
    assert max(undisturbed.norms) > 1.5 > min(undisturbed.norms)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_zero_on_two_ranks_gives_the_losses_of_native(stage, micro_batch_size, undisturbed):
    assert_close(train_zero(stage, micro_batch_size=micro_batch_size), undisturbed)


def test_micro_batches_of_native_add_up_to_the_whole_batch(undisturbed):
    assert_close(train_native(micro_batch_size=2), undisturbed)


@pytest.mark.parametrize("stage", [1, 3])
def test_tied_embeddings_and_grouped_heads_train_alike_under_zero(stage):
    assert_close(train_zero(stage, range(6), model=LLAMA), train_native(range(6), model=LLAMA))


def test_zero_runs_on_one_rank_without_a_launcher(undisturbed):
    (outcome,) = run_on_ranks(1, train, kind="deepspeed", zero_stage=2, micro_batch_size=4)
    assert_close(outcome, undisturbed)


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_moves_from_zero_to_native_and_back(stage, undisturbed):
    first_half = train_zero(stage, range(10))
    rest = train_native(range(10, 20), go_on_from=first_half)
    np.testing.assert_allclose(first_half.losses + rest.losses, undisturbed.losses, rtol=1e-5)
    first_half = train_native(range(10))
    back = train_zero(stage, range(10, 20), go_on_from=first_half)
    np.testing.assert_allclose(back.losses, undisturbed.losses[10:], rtol=1e-5)
    assert back.optimizer_step == 20
    assert back.nats_at_start == pytest.approx(rest.nats_at_start, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_imported_is_exported_unchanged(stage):
    before = train_native(range(3))
    after = train_zero(stage, range(0), go_on_from=before)
    for name, state in before.state.items():
        for key, value in state.items():
            np.testing.assert_array_equal(after.state[name][key], value, err_msg=f"{name} {key}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_reset_optimizer_starts_anew_at_every_stage(stage, undisturbed):
    expected = train_native(reset_before=10)
    assert expected.optimizer_step == 10
    assert expected.losses[12:] != undisturbed.losses[12:]
    assert_close(train_zero(stage, reset_before=10), expected)


def choices(ranks: Ranks, **settings: Any) -> tuple[kernels.Choice, ...]:
    return make_engine(ranks, **settings).choices


def test_both_engines_say_what_computes_each_op_and_the_update():
    for said in [choices(Ranks()), run_on_ranks(2, choices, kind="deepspeed")[0]]:
        assert [choice.op for choice in said] == [*kernels.FORMS, "adamw", "clip_grad_norm"]
        assert all(choice.implementation and choice.why for choice in said)


def test_there_are_no_moments_before_the_first_step():
    for outcome in (train_native(range(0)), train_zero(1, range(0)), train_zero(3, range(0))):
        assert outcome.optimizer_step == 0
        weights = build_model(NEOX, seed=1).state_dict()
        for name, state in outcome.state.items():
            np.testing.assert_array_equal(state["weight"], weights[name].numpy())
            assert set(state) == {"weight"}


def test_native_goes_on_bitwise_from_its_own_state(undisturbed):
    rest = train_native(range(10, 20), go_on_from=train_native(range(10)))
    assert rest.losses == undisturbed.losses[10:]
    for name, state in undisturbed.state.items():
        for key, value in state.items():
            np.testing.assert_array_equal(rest.state[name][key], value, err_msg=f"{name} {key}")


def test_importing_weights_alone_resets_the_optimizer(undisturbed):
    before = train_native(range(10))
    before.state = {name: {"weight": state["weight"]} for name, state in before.state.items()}
    before.optimizer_step = 0
    expected = train_native(range(20), reset_before=10)
    for rest in (train_native(range(10, 20), go_on_from=before), train_zero(3, range(10, 20), go_on_from=before)):
        np.testing.assert_allclose(rest.losses, expected.losses[10:], rtol=1e-5)
        assert rest.optimizer_step == 10


def poisoned_step(ranks: Ranks, before: Outcome, **settings: Any) -> tuple[Any, State, int]:
    engine = make_engine(ranks, **settings)
    restore(engine, before)
    rows = ROWS // ranks.world_size
    result = engine.step(batch(0)[:rows], 1e-3)
    return result, arrays(engine), engine.optimizer_step


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(stage):
    before = train_native(range(2))
    before.state["layers.1.mlp.down.weight"]["weight"][:] = 1e38
    if stage is None:
        result, state, updates = poisoned_step(Ranks(), before)
    else:
        result, state, updates = run_on_ranks(2, poisoned_step, before, kind="deepspeed", zero_stage=stage)[0]
    assert not np.isfinite(result.loss)
    assert not result.applied
    assert updates == 2
    for name, expected in before.state.items():
        for key, value in expected.items():
            np.testing.assert_array_equal(state[name][key], value, err_msg=f"{name} {key}")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32_and_moves_between_stages(stage, undisturbed):
    first_half = train_zero(stage, range(5), precision="bf16")
    rest = train_zero(1 + stage % 3, range(5, 10), go_on_from=first_half, precision="bf16")
    np.testing.assert_allclose(first_half.losses + rest.losses, undisturbed.losses[:10], rtol=5e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_begin_at_the_initial_weights_not_at_their_rounding(stage):
    weights = build_model(NEOX, seed=1).state_dict()
    for name, state in train_zero(stage, range(0), precision="bf16").state.items():
        np.testing.assert_array_equal(state["weight"], weights[name].numpy(), err_msg=name)


def let_deepspeed_run_fp16() -> None:
    """It refuses fp16 on a CPU, which can in fact do it."""
    from deepspeed import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]


def train_fp16(ranks: Ranks, *args: Any, **settings: Any) -> Outcome:
    let_deepspeed_run_fp16()
    return train(ranks, *args, precision="fp16", **settings)


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_an_fp16_overflow_skips_the_update_and_lowers_the_loss_scale(stage, undisturbed):
    before = Outcome(state=train_native(range(0)).state, loss_scale=(2.0**40, 0))

    def run(go_on_from: Outcome, steps: range) -> Outcome:
        if stage is None:
            return train_native(steps, go_on_from=go_on_from, precision="fp16")
        return run_on_ranks(2, train_fp16, steps, go_on_from=go_on_from, kind="deepspeed", zero_stage=stage)[0]

    overflowing = run(before, range(3))
    assert not any(overflowing.applied)
    assert overflowing.optimizer_step == 0
    assert overflowing.loss_scale[0] < 2.0**40
    np.testing.assert_array_equal(overflowing.state["head.weight"]["weight"], before.state["head.weight"]["weight"])
    before.loss_scale = (1024.0, 0)
    training = run(before, range(10))
    assert all(training.applied)
    assert training.loss_scale == (1024.0, 10)
    np.testing.assert_allclose(training.losses, undisturbed.losses[:10], rtol=5e-3)


@pytest.mark.parametrize(
    "settings", [{"activation_checkpointing": "full"}, {"loss_chunk": 7}, {"loss_chunk": 1}], ids=str
)
def test_settings_that_save_memory_change_no_loss(settings, undisturbed):
    outcome = train_native(range(5), **settings)
    np.testing.assert_allclose(outcome.losses, undisturbed.losses[:5], rtol=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_layers_are_computed_again_under_zero(stage, undisturbed):
    outcome = train_zero(stage, range(5), activation_checkpointing="full", micro_batch_size=2)
    np.testing.assert_allclose(outcome.losses, undisturbed.losses[:5], rtol=1e-5)


@pytest.mark.long
def test_compiled_layers_give_the_same_losses(undisturbed):
    outcome = train_native(range(5), compile=True)
    np.testing.assert_allclose(outcome.losses, undisturbed.losses[:5], rtol=1e-5)


@pytest.fixture(scope="module")
def apart() -> Outcome:
    """Token 7 ends a document: about one in 50 does."""
    return train_native(range(5), document_end=7)


@pytest.mark.parametrize("stage", STAGES)
def test_documents_are_kept_apart_under_zero_as_in_native(stage, apart, undisturbed):
    assert abs(apart.losses[-1] - undisturbed.losses[4]) > 1e-4
    settings = {"micro_batch_size": 2, "activation_checkpointing": "full" if stage == 3 else "none"}
    assert_close(train_zero(stage, range(5), document_end=7, **settings), apart)


@pytest.fixture(scope="module")
def padded() -> Outcome:
    return train_native(range(5), padded=True)


def test_a_padded_batch_gives_the_mean_over_its_real_targets(padded):
    model = build_model(NEOX, seed=1)
    rows = [torch.from_numpy(row[row != PADDING]) for row in pad(batch(0))]
    nats = sum(model(row[None, :-1], row[None, 1:])[0] for row in rows)
    loss = nats / sum(len(row) - 1 for row in rows)
    loss.backward()
    assert padded.losses[0] == pytest.approx(loss.item(), rel=1e-6)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert padded.norms[0] == pytest.approx(norm.item(), rel=1e-5)


def test_padding_is_no_documents_whatever_token_ends_them(monkeypatch):
    counted = []

    def counting(q, k, v, bounds, scale):
        counted.append(len(bounds) - 1)
        return kernels.REFERENCE.document_attention(q, k, v, bounds, scale)

    monkeypatch.setitem(kernels.FORMS["document_attention"], "one_by_one", counting)
    for end in (0, 7):
        tokens = np.where(pad(batch(0)) == 0, 1, pad(batch(0)))
        tokens[tokens == 7] = 1
        targets = int((tokens[:, 1:] != PADDING).sum())
        named = {"document_attention": "one_by_one"}
        make_engine(Ranks(), document_end=end, kernels=named).step(tokens, 1e-3, targets=targets)
    assert set(counted) == {ROWS}


def test_the_micro_batch_does_not_change_the_losses_of_padded_batches(padded):
    assert_close(train_native(range(5), padded=True, micro_batch_size=1), padded)


@pytest.mark.parametrize("stage", STAGES)
def test_padded_batches_train_alike_on_two_ranks_that_hold_unlike_parts(stage, padded):
    assert_close(train_zero(stage, range(5), padded=True, micro_batch_size=2), padded)


@pytest.mark.long
def test_compiled_layers_keep_documents_apart(apart):
    outcome = train_native(range(5), document_end=7, compile=True)
    np.testing.assert_allclose(outcome.losses, apart.losses, rtol=1e-5)


def test_z_loss_moves_the_weights_and_not_the_loss_that_is_reported():
    """Against plain PyTorch, where log Z is a logsumexp and its square a part of what is minimised."""
    model = build_model(NEOX, seed=1)
    tokens = torch.from_numpy(batch(0))
    logits = model(tokens[:, :-1])
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    squares = logits.logsumexp(-1).square().mean()
    (nats + 0.1 * squares).backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    engine = make_engine(Ranks(), optimizer=replace(OPTIMIZER, z_loss=0.1), micro_batch_size=2, loss_chunk=5)
    held_out = batch(7)
    before = engine.nats(held_out[:, :-1], held_out[:, 1:])
    assert before == pytest.approx(make_engine(Ranks()).nats(held_out[:, :-1], held_out[:, 1:]), rel=1e-6)
    result = engine.step(batch(0), 1e-3)
    assert result.loss == pytest.approx(nats.item(), rel=1e-5)
    assert result.log_z == pytest.approx(squares.item() ** 0.5, rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_switches_train_alike_under_zero(stage):
    mup = MupConfig(base_hidden_size=16, base_head_dim=4)  # a group of parameters more, at a third of the rate
    settings = {"model": replace(LLAMA, qk_norm="layer_norm", mup=mup), "optimizer": replace(OPTIMIZER, z_loss=1e-2)}
    settings["weight_decay"] = 1e-3
    expected = train_native(range(6), **settings)
    assert expected.losses[1:] != train_native(range(6), model=LLAMA).losses[1:]
    assert_close(train_zero(stage, range(6), **settings), expected)


def test_ignored_targets_add_no_nats():
    engine = make_engine(Ranks())
    tokens, targets = batch(0)[:, :-1], batch(0)[:, 1:]
    by_row = sum(engine.nats(tokens[i : i + 1], targets[i : i + 1]) for i in range(3))
    masked = targets.copy()
    masked[3:] = -100
    assert engine.nats(tokens, masked) == pytest.approx(by_row, rel=1e-6)
    assert engine.nats(tokens, np.full_like(targets, -100)) == 0.0


def last_logits(ranks: Ranks, **settings: Any) -> np.ndarray:
    return make_engine(ranks, **settings).logits(batch(0)).numpy()


def test_logits_are_those_of_the_last_position():
    logits = last_logits(Ranks())
    expected = build_model(NEOX, seed=1)(torch.from_numpy(batch(0)))[:, -1].detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for theirs in run_on_ranks(2, last_logits, kind="deepspeed", zero_stage=3):
        np.testing.assert_allclose(theirs, expected, atol=1e-5)


def extensions(ranks: Ranks) -> list[str]:
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    return os.listdir(folder) if folder.exists() else []


def test_deepspeed_compiles_nothing():
    run_on_ranks(2, train, range(1), kind="deepspeed", zero_stage=3)
    assert run_on_ranks(2, extensions) == [[], []]


def test_a_micro_batch_that_does_not_divide_the_rows_is_refused():
    with pytest.raises(LaunchError, match=r"is 8 sequences; it must be a multiple of engine.micro_batch_size, 3"):
        make_engine(Ranks(), micro_batch_size=3).step(batch(0), 1e-3)


def test_native_refuses_several_ranks():
    with pytest.raises(LaunchError, match=r"2 ranks were started; set engine.kind=deepspeed"):
        make_engine(Ranks(rank=0, world_size=2))


def test_another_version_of_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.20.1")
    with pytest.raises(LaunchError, match=r"needs DeepSpeed 0.19, and it is 0.20.1: pip install 'deepspeed==0.19"):
        make_engine(Ranks(), kind="deepspeed")


def test_a_state_of_another_shape_is_refused():
    before = train_native(range(0))
    before.state["final_norm.bias"]["weight"] = np.zeros(7, np.float32)
    with pytest.raises(CheckpointError, match=r"final_norm.bias \(weight\) is \[7\] in the checkpoint and \[45\]"):
        restore(make_engine(Ranks()), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_batches_are_staged_in_pinned_memory_on_a_gpu():
    staged = make_engine(Ranks()).stage(batch(0))
    assert torch.from_numpy(staged).is_pinned()
    np.testing.assert_array_equal(staged, batch(0))
