"""What a step shows of the inside, against plain PyTorch, and at every ZeRO stage against one process."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacl import kernels
from megacl.config import EngineConfig, OptimizerConfig
from megacl.data.packing import PADDING
from megacl.engine import Engine, build_engine
from megacl.engine.monitors import Monitors, largest_logit, part_of
from megacl.model.config import ModelConfig, MupConfig
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from tests.ranks import arranged, run_on_ranks

# Sizes that no number of ranks divides; two widths of muP, so that there are three groups of parameters.
NEOX = ModelConfig(vocab_size=223, hidden_size=45, num_layers=3, num_attention_heads=3)
LLAMA = ModelConfig(
    form="llama",
    vocab_size=223,
    hidden_size=48,
    intermediate_size=51,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    tie_embeddings=True,
    qk_norm="rms_norm",
    mup=MupConfig(base_hidden_size=16, base_head_dim=4),
)
MODELS = pytest.mark.parametrize("config", [NEOX, LLAMA], ids=["gpt_neox", "llama"])
OPTIMIZER = OptimizerConfig(max_grad_norm=0.5, eps=1e-6, weight_decay=0.3)
ROWS, LENGTH = 4, 12


def batch(step: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox([4, step])).integers(0, 50, (ROWS, LENGTH + 1))


def make_engine(ranks: Ranks, config: ModelConfig, document_end: int | None = None, **settings: Any) -> Engine:
    model = build_model(config, seed=1, device="meta")
    model.document_end = document_end
    return build_engine(model, engine=EngineConfig(**settings), optimizer=OPTIMIZER, ranks=ranks)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: state["weight"] for name, state in engine.export_state()}


def norms(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """The norm of all tensors of a part, by part."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(part_of(name), []).append(tensor.double().flatten())
    return {part: torch.cat(pieces).norm().item() for part, pieces in parts.items()}


def by_part(monitors: Monitors, quantity: str) -> dict[str, float]:
    layers = {f"layers.{index}": getattr(layer, quantity) for index, layer in enumerate(monitors.layers)}
    return layers | {name: getattr(part, quantity) for name, part in monitors.others.items()}


def logits_by_hand(
    config: ModelConfig, state: dict[str, torch.Tensor], rows: np.ndarray, document_end: int | None = None
) -> list[float]:
    """The largest scaled product of a query with a key at or before it, in its document, of each layer."""
    model = build_model(config, seed=1)
    model.load_state_dict(state, strict=False)  # a tied head is the embedding
    found = []

    def keeping(q_BHTE, k_BKTE, v_BKTE, scale):
        products = []
        for b, h in np.ndindex(q_BHTE.shape[:2]):
            begin = 0
            for t in range(LENGTH):
                begin = t if rows[b, t] == document_end else begin
                k_SE = k_BKTE[b, h * k_BKTE.shape[1] // q_BHTE.shape[1], begin : t + 1]
                products.append((k_SE @ q_BHTE[b, h, t]).max().item() * scale)
        found.append(max(products))
        return kernels.REFERENCE.attention(q_BHTE, k_BKTE, v_BKTE, scale)

    def keeping_documents(q_BHTE, k_BKTE, v_BKTE, bounds_D, scale):
        keeping(q_BHTE, k_BKTE, v_BKTE, scale)
        return kernels.REFERENCE.document_attention(q_BHTE, k_BKTE, v_BKTE, bounds_D, scale)

    model.use(replace(kernels.REFERENCE, attention=keeping, document_attention=keeping_documents))
    model.document_end = document_end
    with torch.no_grad():
        model(torch.from_numpy(rows[:, :-1]))
    return found


# ---------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("weight_decay", [None, 0.02])
@MODELS
def test_all_of_it_is_what_plain_pytorch_finds(config, weight_decay):
    engine = make_engine(Ranks(), config, micro_batch_size=2)
    for step in range(2):
        engine.step(batch(step), 2e-3)
    before = weights(engine)
    result = engine.step(batch(2), 2e-3, weight_decay=weight_decay, monitor=True)
    after = weights(engine)
    monitors = result.monitors
    assert monitors is not None

    model = build_model(config, seed=1)
    model.load_state_dict(before, strict=False)
    tokens = torch.from_numpy(batch(2))
    torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert result.grad_norm > OPTIMIZER.max_grad_norm  # it was clipped, which is not to be seen
    assert by_part(monitors, "grad_norm") == pytest.approx(norms(gradients), rel=1e-4)

    updates, sizes = norms({name: after[name].double() - before[name] for name in before}), norms(before)
    ratios = {part: updates[part] / sizes[part] for part in updates}
    assert by_part(monitors, "update_to_weight") == pytest.approx(ratios, rel=1e-3)
    assert [layer.attention_logit_max for layer in monitors.layers] == pytest.approx(
        logits_by_hand(config, before, batch(2)[:1]), rel=1e-4
    )
    assert set(monitors.others) == {"embed", "final_norm", *([] if config.tie_embeddings else ["head"])}


def test_looking_changes_nothing():
    looked, plain = make_engine(Ranks(), NEOX), make_engine(Ranks(), NEOX)
    for step in range(3):
        assert looked.step(batch(step), 2e-3, monitor=True).loss == plain.step(batch(step), 2e-3).loss
    assert plain.step(batch(3), 2e-3).monitors is None
    looked.step(batch(3), 2e-3)
    for name, weight in weights(looked).items():
        torch.testing.assert_close(weight, weights(plain)[name], rtol=0, atol=0)


def test_a_skipped_update_has_logits_and_no_norms():
    engine = make_engine(Ranks(), NEOX)
    result = engine.step(batch(0), 2e-3, skip_above=0.0, monitor=True)
    assert not result.applied
    assert result.monitors is not None
    assert all(np.isfinite(layer.attention_logit_max) for layer in result.monitors.layers)
    for quantity in ("grad_norm", "update_to_weight"):
        assert all(np.isnan(value) for value in by_part(result.monitors, quantity).values())


def test_logits_across_documents_do_not_count():
    engine = make_engine(Ranks(), NEOX, document_end=7)
    tokens = batch(0)
    tokens[0, [3, 8]] = 7
    monitors = engine.step(tokens, 2e-3, monitor=True).monitors
    assert monitors is not None
    state = build_model(NEOX, seed=1).state_dict()
    apart = logits_by_hand(NEOX, state, tokens[:1], document_end=7)
    assert [layer.attention_logit_max for layer in monitors.layers] == pytest.approx(apart, rel=1e-5)
    assert apart != pytest.approx(logits_by_hand(NEOX, state, tokens[:1]), rel=1e-5)


def test_a_padded_row_is_looked_at_like_any_other():
    engine = make_engine(Ranks(), NEOX)
    tokens = batch(0)
    tokens[:, LENGTH - 3 :] = PADDING
    result = engine.step(tokens, 2e-3, targets=int((tokens[:, 1:] != PADDING).sum()), monitor=True)
    assert result.monitors is not None
    filled = np.where(tokens == PADDING, 0, tokens)
    expected = logits_by_hand(NEOX, build_model(NEOX, seed=1).state_dict(), filled[:1])
    assert [layer.attention_logit_max for layer in result.monitors.layers] == pytest.approx(expected, rel=1e-5)


@given(
    kv_heads=st.sampled_from([1, 2]),
    groups=st.integers(1, 3),
    length=st.integers(1, 9),
    scores=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_logits_are_the_same_in_blocks_of_any_size(kv_heads, groups, length, scores, seed):
    generator = torch.Generator().manual_seed(seed)
    q_BHTE = torch.randn(2, kv_heads * groups, length, 4, generator=generator)
    k_BKTE = torch.randn(2, kv_heads, length, 4, generator=generator)
    products = q_BHTE @ k_BKTE.repeat_interleave(groups, dim=1).mT
    begins = torch.rand(2, length, generator=generator) < 0.4
    begins[:, 0] = True
    bounds_D = torch.cat([begins.flatten().nonzero().squeeze(1), torch.tensor([2 * length])]).int()
    document_BT = begins.flatten().cumsum(0).view(2, length)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    inside = seen & (document_BT[:, :, None] == document_BT[:, None, :])
    for bounds, mask in ((None, seen), (bounds_D, inside[:, None])):
        found = largest_logit(q_BHTE, k_BKTE, 0.5, bounds, scores=scores)
        torch.testing.assert_close(found, products.masked_fill(~mask, -torch.inf).amax() * 0.5)


# ---------------------------------------------------------------------------------------------- several ranks


def monitored(
    ranks: Ranks, config: ModelConfig, steps: int, **settings: Any
) -> tuple[list[list[float]], dict[str, float], dict[str, float]]:
    """Of the last of `steps`, all of which are looked into: the largest logits, and what by_part gives."""
    engine = make_engine(ranks, config, **settings)
    rows = ROWS // ranks.dp_size
    for step in range(steps):
        result = engine.step(batch(step)[ranks.dp_rank * rows :][:rows], 2e-3, monitor=True)
    assert result.applied
    assert result.monitors is not None
    logits = [layer.attention_logit_max for layer in result.monitors.layers]
    return logits, by_part(result.monitors, "grad_norm"), by_part(result.monitors, "update_to_weight")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@MODELS
def test_zero_on_two_ranks_sees_what_one_process_sees(config, stage):
    first, second = run_on_ranks(2, monitored, config, 3, kind="deepspeed", zero_stage=stage, micro_batch_size=1)
    assert first == second
    logits, gradients, updates = first
    _, expected_gradients, expected_updates = monitored(Ranks(), config, 3)
    assert gradients == pytest.approx(expected_gradients, rel=1e-4)
    assert updates == pytest.approx(expected_updates, rel=1e-3)
    engine = make_engine(Ranks(), config)
    for step in range(2):
        engine.step(batch(step), 2e-3)
    halves = [logits_by_hand(config, weights(engine), batch(2)[row : row + 1]) for row in (0, ROWS // 2)]
    assert logits == pytest.approx(np.max(halves, axis=0).tolist(), rel=1e-4)


def monitored_in_groups(ranks: Ranks, tp: int, sp: int, *args: Any, **settings: Any) -> Any:
    return monitored(arranged(ranks, tp, sp), *args, tensor_parallel=tp, sequence_parallel=sp, **settings)


@pytest.mark.parametrize(("tp", "sp", "stage"), [(2, 1, 0), (2, 1, 1), (2, 1, 3), (1, 2, 0), (1, 2, 3)])
def test_ranks_that_share_layers_or_sequences_see_what_one_process_sees(tp, sp, stage):
    config = replace(LLAMA, vocab_size=224, intermediate_size=52)
    first, second = run_on_ranks(2, monitored_in_groups, tp, sp, config, 3, kind="deepspeed", zero_stage=stage)
    assert first == second
    for found, expected in zip(first, monitored(Ranks(), config, 3), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_on_the_host_sees_the_same(stage):
    settings = {"kind": "deepspeed", "zero_stage": stage, "offload_optimizer": True}
    _, *found = run_on_ranks(2, monitored, NEOX, 3, **settings)[0]
    for values, expected in zip(found, monitored(Ranks(), NEOX, 3)[1:], strict=True):
        assert values == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_sees_about_what_fp32_sees(stage):
    found = run_on_ranks(2, monitored, NEOX, 3, kind="deepspeed", zero_stage=stage, precision="bf16")[0]
    expected = monitored(Ranks(), NEOX, 3)
    assert found[1] == pytest.approx(expected[1], rel=0.1)
    assert found[2] == pytest.approx(expected[2], rel=0.1)


def monitored_in_fp16(ranks: Ranks, *args: Any, **settings: Any) -> Any:
    """DeepSpeed refuses fp16 on a CPU, which can in fact do it."""
    from deepspeed import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    return monitored(ranks, *args, precision="fp16", **settings)


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_the_loss_scale_of_fp16_is_not_to_be_seen(stage):
    expected = monitored(Ranks(), NEOX, 3)
    if stage is None:
        found = monitored(Ranks(), NEOX, 3, precision="fp16")
    else:
        found = run_on_ranks(2, monitored_in_fp16, NEOX, 3, kind="deepspeed", zero_stage=stage)[0]
    assert found[1] == pytest.approx(expected[1], rel=0.05)
    assert found[2] == pytest.approx(expected[2], rel=0.05)


@pytest.mark.long
def test_compiled_layers_are_looked_at_as_they_are_written():
    compiled, plain = monitored(Ranks(), NEOX, 2, compile=True), monitored(Ranks(), NEOX, 2)
    for found, expected in zip(compiled, plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
