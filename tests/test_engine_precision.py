"""Precisions: what is computed and sent in 16 bits and what in 32; fp16's loss scale; deterministic runs."""

import os
import re
from typing import Any

import numpy as np
import pytest
import torch

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import Engine, arithmetic, build_engine
from megacl.engine.loss_scale import LossScale
from megacl.kernels import choose_kernels
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from tests.ranks import run_on_ranks

MODEL = ModelConfig(vocab_size=1031, hidden_size=48, num_layers=2, num_attention_heads=3)
ROWS, LENGTH = 8, 12
TOKENS = np.random.Generator(np.random.Philox(9)).integers(0, 1031, (ROWS, LENGTH + 1))
UNCLIPPED = OptimizerConfig(max_grad_norm=None)


def engine_of(ranks: Ranks, optimizer: OptimizerConfig = UNCLIPPED, **settings: Any) -> Engine:
    model = build_model(MODEL, seed=1, device="meta")
    return build_engine(model, engine=EngineConfig(**settings), optimizer=optimizer, ranks=ranks)


def pretend_fp16() -> None:
    """DeepSpeed refuses fp16 on a CPU, which can in fact do it."""
    from deepspeed import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]


def gradients(ranks: Ranks, **settings: Any) -> dict[str, np.ndarray]:
    """The gradient that the first update takes, which is what is left of it in Adam's first moment."""
    pretend_fp16()
    engine = engine_of(ranks, **settings)
    rows = ROWS // ranks.world_size
    assert engine.step(TOKENS[ranks.rank * rows : (ranks.rank + 1) * rows], 1e-3).applied
    return {name: state["exp_avg"].numpy() / (1 - UNCLIPPED.beta1) for name, state in engine.export_state() if state}


# As the ranks have: products in 16 bits are rounded otherwise where two threads share them.
pytestmark = pytest.mark.usefixtures("one_thread")


def expected_gradients(dtype: torch.dtype, parts: int, scale: float) -> dict[str, np.ndarray]:
    """The mean, in fp32, of the gradients that a model in 16 bits has on each part of the batch."""
    sums: dict[str, torch.Tensor] = {}
    for tokens in np.split(TOKENS, parts):
        model = build_model(MODEL, seed=1).to(dtype)
        model.use(choose_kernels(device="cpu", half=True, compiled=False, overrides={}))
        batch = torch.from_numpy(tokens)
        (model(batch[:, :-1], batch[:, 1:])[0] / (tokens.shape[0] * LENGTH) * scale).backward()
        for name, parameter in model.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.float() / scale
    return {name: (total / parts).numpy() for name, total in sums.items()}


def assert_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """To far less than what averaging in 16 bits would round away, 1e-3 and 1e-4."""
    for name, gradient in expected.items():
        error = np.linalg.norm(found[name] - gradient) / (np.linalg.norm(gradient) + 1e-12)
        assert error < 1e-6, (name, error)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_ranks_and_micro_batches_are_averaged_in_fp32(stage, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scale = 65536.0 if precision == "fp16" else 1.0
    settings = {"kind": "deepspeed", "zero_stage": stage, "precision": precision}
    for micro_batch_size, parts in ((None, 2), (1, 8)):
        found = run_on_ranks(2, gradients, micro_batch_size=micro_batch_size, **settings)[0]
        assert_gradients(found, expected_gradients(dtype, parts, scale))


# --------------------------------------------------------------------------------------------- fp16's loss scale

WINDOW = 3


def scales(ranks: Ranks, steps: int, begin: tuple[float, int], **settings: Any) -> list[tuple[bool, float, int]]:
    """(applied, loss scale, updates since the last overflow) after each step, where 3 good updates double the scale."""
    pretend_fp16()
    window, LossScale.WINDOW = LossScale.WINDOW, WINDOW
    try:
        engine = engine_of(ranks, precision="fp16", **settings)
        weights = dict(build_model(MODEL, seed=1).named_parameters())
        engine.import_state(lambda name: {"weight": weights[name]}, optimizer_step=0, loss_scale=begin)
        rows = ROWS // ranks.world_size
        tokens = TOKENS[ranks.rank * rows : (ranks.rank + 1) * rows]
        return [(engine.step(tokens, 1e-4).applied, *engine.loss_scale) for _ in range(steps)]
    finally:
        LossScale.WINDOW = window


def scales_of(stage: int | None, steps: int, begin: tuple[float, int]) -> list[tuple[bool, float, int]]:
    if stage is None:
        return scales(Ranks(), steps, begin)
    return run_on_ranks(2, scales, steps, begin, kind="deepspeed", zero_stage=stage)[0]


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_the_loss_scale_falls_at_overflows_and_grows_behind_them_by_one_rule(stage):
    found = scales_of(stage, 16, (2.0**26, 0))
    applied = [step[0] for step in found]
    assert not applied[0]
    assert sum(applied) > 2 * WINDOW
    scale, good = 2.0**26, 0
    for each in found:
        good = good + 1 if each[0] else 0
        if not each[0]:
            scale /= 2
        elif good in (WINDOW + 1, 2 * WINDOW + 1, 3 * WINDOW + 1):
            scale *= 2
        assert each[1:] == (scale, good)


@pytest.mark.parametrize("stage", [None, 2])
def test_the_loss_scale_grows_after_a_resume_when_it_would_have_without(stage):
    whole = scales_of(stage, 6, (1024.0, 0))
    assert [step[1] for step in whole] == [1024.0, 1024.0, 1024.0, 2048.0, 2048.0, 2048.0]
    assert scales_of(stage, 4, whole[1][1:]) == whole[2:]


def overflows_at_the_smallest(ranks: Ranks, **settings: Any) -> list[tuple[bool, float]]:
    """(applied, loss scale) of three steps whose gradients are above what fp16 holds, at a loss scale of 1."""
    pretend_fp16()
    engine = engine_of(ranks, precision="fp16", **settings)
    weights = {name: parameter.detach() for name, parameter in build_model(MODEL, seed=1).named_parameters()}
    weights["layers.1.mlp.down.weight"].fill_(1e38)
    engine.import_state(lambda name: {"weight": weights[name]}, optimizer_step=0, loss_scale=(1.0, 0))
    rows = ROWS // ranks.world_size
    tokens = TOKENS[ranks.rank * rows : (ranks.rank + 1) * rows]
    return [(engine.step(tokens, 1e-3).applied, engine.loss_scale[0]) for _ in range(3)]


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_overflows_at_the_smallest_loss_scale_are_skipped_and_leave_it_there(stage):
    if stage is None:
        found = overflows_at_the_smallest(Ranks())
    else:
        found = run_on_ranks(2, overflows_at_the_smallest, kind="deepspeed", zero_stage=stage)[0]
    assert found == [(False, 1.0)] * 3


# -------------------------------------------------------------------------------------------- of the whole process


@pytest.fixture
def afterwards_as_before():
    yield
    arithmetic.set_arithmetic(EngineConfig(), device="cpu")


@pytest.mark.usefixtures("afterwards_as_before")
def test_fp32_is_fp32_on_a_gpu_and_tf32_a_choice():
    for precision, expected in (("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")):
        arithmetic.set_arithmetic(EngineConfig(precision=precision), device="cuda")
        assert torch.backends.cuda.matmul.fp32_precision == expected


def test_tf32_on_a_cpu_is_fp32_and_says_so():
    tf32 = engine_of(Ranks(), precision="tf32")
    assert tf32.notices == ["engine.precision tf32 changes nothing on a CPU: it computes in fp32."]
    assert tf32.step(TOKENS, 1e-3) == engine_of(Ranks()).step(TOKENS, 1e-3)


def test_16_bits_on_a_cpu_warn_with_what_was_measured_where_they_are_slower(monkeypatch):
    monkeypatch.setattr(arithmetic, "slowdown", lambda dtype: {torch.bfloat16: 310.0, torch.float16: 1.05}[dtype])
    (notice,) = engine_of(Ranks(), precision="bf16").notices
    assert re.fullmatch(r"engine.precision bf16 is 310.0 times as slow as fp32 .* on this CPU\.", notice)
    assert not engine_of(Ranks(), precision="fp16").notices


def test_the_slowdown_is_measured():
    assert arithmetic.slowdown(torch.float16) > 0


def run(ranks: Ranks, **settings: Any) -> tuple[bool, list[float], list[np.ndarray]]:
    engine = engine_of(ranks, **settings)
    rows = ROWS // ranks.world_size
    losses = [engine.step(TOKENS[ranks.rank * rows : (ranks.rank + 1) * rows], 1e-3).loss for _ in range(4)]
    return (
        torch.are_deterministic_algorithms_enabled(),
        losses,
        [state["weight"].numpy() for _, state in engine.export_state() if state],
    )


@pytest.mark.usefixtures("afterwards_as_before")
def test_deterministic_runs_have_the_same_bits_and_say_so_to_torch(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    first, second = run(Ranks(), deterministic=True), run(Ranks(), deterministic=True)
    assert first[0]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    np.testing.assert_equal(first, second)
    assert not run(Ranks())[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deterministic_runs_on_two_ranks_have_the_same_bits(stage):
    settings = {"kind": "deepspeed", "zero_stage": stage, "deterministic": True}
    first, second = (run_on_ranks(2, run, **settings)[0] for _ in range(2))
    np.testing.assert_equal(first, second)
