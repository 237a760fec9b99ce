"""The model of memory, beside what autograd keeps, what the allocator gave out, and resident memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import build_engine
from megacl.kernels import choose_kernels
from megacl.memory import MemoryEstimate, estimate_memory
from megacl.model.config import ModelConfig
from megacl.model.gpt import GPT, build_model, count_parameters
from megacl.model.layers import find_documents
from megacl.parallel.ranks import Ranks
from megacl.zero_memory import held_by

ROWS, LENGTH = 3, 64

FORMS: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "llama": {"form": "llama", "num_kv_heads": 2, "intermediate_size": 96},
    "tied": {"form": "llama", "tie_embeddings": True},
    "layer norm of heads": {"qk_norm": "layer_norm", "rotary_pct": 1.0},
    "rms norm of heads": {"form": "llama", "qk_norm": "rms_norm", "num_kv_heads": 1},
    "one after the other": {"parallel_residual": False, "attention_bias": "none", "gelu": "tanh"},
    "biases and wide heads": {
        "form": "llama",
        "head_dim": 48,
        "num_kv_heads": 2,
        "attention_bias": "all",
        "mlp_bias": True,
    },
}


def model_of(form: str, **changes: Any) -> ModelConfig:
    shape = {"vocab_size": 512, "hidden_size": 128, "num_layers": 3, "num_attention_heads": 4}
    return ModelConfig(**{**shape, **FORMS[form], **changes})


def kept_by_autograd(model: GPT, tokens: torch.Tensor, *, half: bool) -> int:
    """Bytes of all storages that are saved for the backward pass, but weights and tokens."""
    known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), tokens)}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            saved[place] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(tokens, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def estimate(config: ModelConfig, engine: EngineConfig, **options: Any) -> MemoryEstimate:
    return estimate_memory(config, engine, seq_length=LENGTH, micro_batch_size=ROWS, device="cpu", **options)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_autograd_keeps_is_counted_to_the_byte(form, documents, checkpointing):
    config, engine = model_of(form), EngineConfig(activation_checkpointing=checkpointing)
    model = build_model(config, seed=0)
    model.use(choose_kernels(device="cpu", half=False, compiled=False, overrides={}))
    model.checkpointing = dict.fromkeys(range(config.num_layers), "full") if checkpointing == "full" else {}
    model.document_end = 0 if documents else None
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (ROWS, LENGTH)))
    said = estimate(config, engine, documents=documents).kept
    if documents and checkpointing == "full":  # their bounds are an input of each layer, and not counted
        said += find_documents(tokens, 0)[0].nbytes
    assert kept_by_autograd(model, tokens, half=False) == said


def test_what_autocast_keeps_is_counted_to_the_byte():
    """Under full checkpointing too: the copies of weights are not kept then."""
    for checkpointing in ("none", "full"):
        config, engine = model_of("gpt_neox"), EngineConfig(precision="bf16", activation_checkpointing=checkpointing)
        model = build_model(config, seed=0)
        model.use(choose_kernels(device="cpu", half=True, compiled=False, overrides={}))
        model.checkpointing = dict.fromkeys(range(config.num_layers), "full") if checkpointing == "full" else {}
        tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (ROWS, LENGTH)))
        assert kept_by_autograd(model, tokens, half=True) == estimate(config, engine).kept


@pytest.mark.parametrize("form", ["llama", "rms norm of heads", "biases and wide heads"])
def test_copies_of_keys_that_heads_share_are_counted_to_the_byte(form, monkeypatch):
    """As on a GPU in 32 bits; that it is one is pretended."""
    monkeypatch.setattr("megacl.kernels.reference.repeats_keys", lambda device, itemsize: True)
    monkeypatch.setattr("megacl.memory.repeats_keys", lambda device, itemsize: True)
    config, overrides = model_of(form), {"rotary_attention": "apart"}
    model = build_model(config, seed=0)
    model.use(choose_kernels(device="cpu", half=False, compiled=False, overrides=overrides))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (ROWS, LENGTH)))
    assert kept_by_autograd(model, tokens, half=False) == estimate(config, EngineConfig(kernels=overrides)).kept


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_counted_to_the_byte(form):
    update = estimate(model_of(form), EngineConfig()).moments[-1]
    assert update.parameters == update.gradients == 4 * count_parameters(model_of(form))
    assert update.optimizer == 8 * count_parameters(model_of(form))


def allocated(config: ModelConfig, engine: EngineConfig, *, micro_batches: int) -> int:
    """Bytes of tensors at the peak of a second step, weights and moments included, by the profiler's record."""
    rows = (engine.micro_batch_size or 0) * micro_batches
    model = build_model(config, seed=0)
    built = build_engine(model, engine=engine, optimizer=OptimizerConfig(), ranks=Ranks())
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, LENGTH + 1))
    built.step(tokens, lr=1e-3)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        built.step(tokens, lr=1e-3)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return 12 * count_parameters(config) + int(np.cumsum(changes).max())


SHAPES: list[dict[str, Any]] = [{}, {"vocab_size": 4096}, {"num_layers": 12, "hidden_size": 64}]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective", (0, 2)])
@pytest.mark.parametrize("form", ["gpt_neox", "llama", "tied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_allocates_what_was_estimated(form, shape, checkpointing, micro_batches):
    config = model_of(form, **shape)
    engine = EngineConfig(micro_batch_size=ROWS, loss_chunk=64, activation_checkpointing=checkpointing)
    said = estimate(config, engine, micro_batches=micro_batches).peak.total
    found = allocated(config, engine, micro_batches=micro_batches)
    # Where a processor has no AVX-512, oneDNN copies the matrix that it multiplies by into a layout of its own.
    largest = 4 * max(weights.numel() for weights in build_model(config, seed=0, device="meta").parameters())
    copied = 0 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else largest
    assert 0.99 * said <= found <= 1.01 * said + copied


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("form", ["one after the other", "biases and wide heads"])
def test_a_step_of_what_others_train_allocates_what_was_estimated(form, checkpointing):
    test_a_step_allocates_what_was_estimated(form, {}, checkpointing, 1)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("form", ["gpt_neox", "llama"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_in_sixteen_bits_allocates_what_was_estimated(form, shape, checkpointing):
    """Within 3 %: products of 16 bits take buffers of their own on a CPU."""
    config = model_of(form, **shape)
    engine = EngineConfig(
        micro_batch_size=ROWS, loss_chunk=64, activation_checkpointing=checkpointing, precision="bf16"
    )
    said = estimate(config, engine).peak.total
    assert said == pytest.approx(allocated(config, engine, micro_batches=1), rel=0.03)


REPOSITORY = Path(__file__).resolve().parents[1]


def benchmark(*arguments: str) -> str:
    """What tools/bench/memory.py prints."""
    command = [sys.executable, "tools/bench/memory.py", *arguments]
    here = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY, env=here, timeout=900)
    return done.stdout


def beside_resident_memory(**case: Any) -> tuple[int, int]:
    """(estimate, measurement) in bytes, of fresh processes."""
    said, found = map(int, benchmark("--case", json.dumps(case)).split())
    return said, found


def test_the_table_for_gpus_needs_none():
    lines = benchmark("--table").splitlines()
    assert lines[2].startswith("| 405m | 1 | native | 8 | 1.6 | 3.2 |")
    assert any("offload_optimizer=true" in line and "on the host" in line for line in lines)
    assert all(line.count("|") == 10 for line in lines)


@pytest.mark.parametrize(
    "case", [{}, pytest.param({"vocab_size": 32768, "tie_embeddings": True}, marks=pytest.mark.long)]
)
def test_resident_memory_is_within_five_percent(case):
    model = {"vocab_size": 8192, "hidden_size": 384, "num_layers": 6, "num_attention_heads": 6, **case}
    said, found = beside_resident_memory(model=model, micro_batch_size=4)
    assert said == pytest.approx(found, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resident_memory_of_each_zero_stage_is_within_five_percent(stage, ranks):
    model = {"vocab_size": 8192, "hidden_size": 384, "num_layers": 6, "num_attention_heads": 6}
    engine = {"kind": "deepspeed", "zero_stage": stage}
    said, found = beside_resident_memory(model=model, engine=engine, micro_batch_size=4, ranks=ranks)
    assert said == pytest.approx(found, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_resident_memory_is_within_five_percent_where_gradients_are_sent_in_several_buckets(stage, ranks):
    model = {"vocab_size": 8192, "hidden_size": 1024, "num_layers": 9, "num_attention_heads": 8}  # 130 million
    engine = {"kind": "deepspeed", "zero_stage": stage}
    said, found = beside_resident_memory(model=model, engine=engine, seq_length=64, micro_batch_size=2, ranks=ranks)
    assert said == pytest.approx(found, rel=0.05)


@pytest.mark.long
def test_resident_memory_is_within_five_percent_where_the_most_is_there_while_weights_are_gathered():
    model = {"vocab_size": 50304, "hidden_size": 1024, "num_layers": 3, "num_attention_heads": 8}
    engine = {"kind": "deepspeed", "zero_stage": 3}
    said, found = beside_resident_memory(model=model, engine=engine, seq_length=64, micro_batch_size=2, ranks=2)
    assert said == pytest.approx(found, rel=0.05)


def test_what_is_sent_of_gradients_is_what_filled_the_buffer():
    """30, 30, 60 and 10 million elements, from the last: each goes when the next has no room in 50 million."""
    sizes = [30_000_000, 30_000_000, 60_000_000, 10_000_000]
    held = held_by(EngineConfig(kind="deepspeed", zero_stage=3), sizes=sizes, ranks=1, accumulates=False, device="cpu")
    buffer = 4 * 30_000_000  # the one of 60 million does not pass through it
    coming, arrivals = 0, []
    for size in reversed(sizes):
        arrivals.append(held.arriving(4 * coming, 4 * size))
        coming += size
    copies = [0, 10_000_000, 60_000_000, 30_000_000]  # twice in fp32: what is sent, and gloo's
    assert [found.sending for found in arrivals] == [buffer + 8 * copy for copy in copies]
    assert held.endings["reduction"].sending == buffer + 8 * 30_000_000
