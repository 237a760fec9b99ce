"""ZeRO-3 builds a model shard by shard, and loads one tensor at a time: the peak of a process's memory says so."""

import functools
from pathlib import Path

import pytest
import torch

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import adapter, build_engine
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model, count_parameters
from megacl.parallel.ranks import Ranks
from tests.ranks import run_on_fresh_ranks

MIB = 2**20
LARGE = ModelConfig(vocab_size=4096, hidden_size=640, num_layers=20, num_attention_heads=8)
TINY = ModelConfig(vocab_size=64, hidden_size=32, num_layers=1, num_attention_heads=2)
ZERO3 = EngineConfig(kind="deepspeed", zero_stage=3)


class Memory:
    """Resident memory from here on, in bytes."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        self._before = self._read("VmRSS")

    def grown(self) -> int:
        """The peak since, above what was there at first."""
        return self._read("VmHWM") - self._before

    def _read(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def build_and_load(ranks: Ranks) -> tuple[int, int]:
    """How much memory grows while a model is built in shards, and while an engine loads one."""
    build_engine(build_model(TINY, seed=1, device="meta"), engine=ZERO3, optimizer=OptimizerConfig(), ranks=ranks)
    memory = Memory()
    model = build_model(LARGE, seed=1, device="meta")
    model.materialize("cpu", finish=functools.partial(adapter.partition, dtype=torch.float32, ranks=ranks))
    built = memory.grown()
    del model
    model = build_model(LARGE, seed=1, device="meta")
    initial = model.initial
    engine = build_engine(model, engine=ZERO3, optimizer=OptimizerConfig(), ranks=ranks)
    memory = Memory()
    engine.import_state(lambda name: {"weight": initial(name)}, optimizer_step=0, loss_scale=None)
    return built, memory.grown()


@pytest.mark.long
def test_zero_3_never_holds_the_whole_model_while_it_is_built_or_loaded(monkeypatch):
    # What is freed goes back to the system at once: how much of it glibc would keep differs from run to run.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    whole = 4 * count_parameters(LARGE)
    module = 4 * max(LARGE.mlp_size, LARGE.vocab_size) * LARGE.hidden_size
    assert whole > 380 * MIB
    for built, loaded in run_on_fresh_ranks(2, build_and_load):
        assert built < whole / 2 + 3 * module + 16 * MIB
        assert loaded < 3 * module + 16 * MIB
