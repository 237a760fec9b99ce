"""Peak memory of training steps beside what megacl.memory says they take.

    python tools/bench/memory.py            # each case measured in fresh processes, a table of both and their ratio
    python tools/bench/memory.py --table    # docs/parallelism.md's table: estimates for GPUs, nothing is measured
    python tools/bench/memory.py --case '{"model": {...}, "engine": {...}, "seq_length": 256, "micro_batch_size": 8}'

On a CPU it is resident memory: the highest value (VmHWM) that a process reaches while it builds a model and takes three
steps, less what it had before the model was built, when it had taken steps of a tiny one, so that libraries are loaded.
MALLOC_MMAP_THRESHOLD_=65536 is set, so that glibc gives each tensor pages of its own and takes them back at once;
without it resident memory is what tensors take and what malloc keeps for later. On a GPU it is
torch.cuda.max_memory_allocated.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

MODEL = {"vocab_size": 8192, "hidden_size": 384, "num_layers": 6, "num_attention_heads": 6}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Case:
    """One thing to measure: a model, an engine, a batch."""

    model: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)
    seq_length: int = 256
    micro_batch_size: int = 8
    micro_batches: int = 1
    ranks: int = 1


def run_case(case: Case) -> int:
    """Bytes at the peak of training steps of this case, measured in this process, which must be fresh."""
    import numpy as np
    import torch

    from megacl.config import EngineConfig, OptimizerConfig
    from megacl.engine import build_engine
    from megacl.model.config import ModelConfig
    from megacl.model.gpt import build_model
    from megacl.parallel.ranks import start_ranks, stop_ranks

    warnings.simplefilter("ignore")
    settings = EngineConfig(**case.engine)
    ranks = start_ranks(timeout=300).arrange(
        tensor_parallel=settings.tensor_parallel, sequence_parallel=settings.sequence_parallel
    )

    def train(model: dict[str, Any], rows: int, length: int) -> None:
        config = ModelConfig(**model)
        engine = build_engine(
            build_model(config, seed=0, device="meta"),
            engine=replace(settings, micro_batch_size=rows),
            optimizer=OptimizerConfig(),
            ranks=ranks,
        )
        draw = np.random.default_rng(ranks.dp_rank)
        for _ in range(3):
            tokens = draw.integers(0, config.vocab_size, (rows * case.micro_batches, length + 1))
            engine.step(tokens, lr=1e-4)

    train({**case.model, "vocab_size": 64, "hidden_size": 64, "num_layers": 1, "num_attention_heads": 2}, 1, 16)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(case.model, case.micro_batch_size, case.seq_length)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the highest value starts anew from here
        before = resident("VmRSS")
        train(case.model, case.micro_batch_size, case.seq_length)
        peak = resident("VmHWM") - before
    stop_ranks()
    return peak


def resident(key: str) -> int:
    """Bytes of resident memory of this process: VmRSS, what it has now, or VmHWM, the most that it had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(case: Case) -> int:
    """Bytes at the peak of the case's largest rank, in fresh processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(case))]
    here = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu"}
    processes = []
    for rank in range(case.ranks):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(case.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(subprocess.Popen(command, env={**here, **place}, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"measuring {case} failed")
    return max(int(output.split()[-1]) for output in outputs)


def estimated(case: Case) -> tuple[int, str]:
    """Bytes at the peak that the model of memory says, and when that is."""
    from megacl.config import EngineConfig
    from megacl.engine import device_here
    from megacl.memory import estimate_memory
    from megacl.model.config import ModelConfig

    peak = estimate_memory(
        ModelConfig(**case.model),
        EngineConfig(**case.engine),
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch_size,
        micro_batches=case.micro_batches,
        ranks=case.ranks,
        device=device_here(),
    ).peak
    return peak.total, peak.when


def cases() -> list[Case]:
    """Forms, checkpointing, vocabularies and batches on one rank; then each ZeRO stage on one and on two."""
    llama = {**MODEL, "form": "llama", "num_kv_heads": 2, "intermediate_size": 1024}
    wide = {**MODEL, "vocab_size": 50304}
    found = []
    for model in (MODEL, llama, wide, {**wide, "tie_embeddings": True}):
        for checkpointing in ("none", "selective", "full"):
            for rows in (2, 16):
                found.append(Case(model, {"activation_checkpointing": checkpointing}, micro_batch_size=rows))
        found.append(Case(model, micro_batch_size=4, micro_batches=2))
    for ranks in (1, 2):
        for stage in (0, 1, 2, 3):
            for model in (MODEL, wide):
                engine: dict[str, Any] = {"kind": "deepspeed", "zero_stage": stage}
                found.append(Case(model, engine, micro_batch_size=4, ranks=ranks))
    offloaded: dict[str, Any] = {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": True}
    tensor_parallel: dict[str, Any] = {"kind": "deepspeed", "zero_stage": 1, "tensor_parallel": 2}
    sequence_parallel: dict[str, Any] = {"kind": "deepspeed", "zero_stage": 1, "sequence_parallel": 2}
    for engine in (offloaded, tensor_parallel, sequence_parallel):
        found.append(Case(MODEL, engine, micro_batch_size=16, ranks=2))
    return found


def table() -> None:
    """Measures each case and prints it beside its estimate, in Markdown."""
    print("| model | engine | ranks | sequences | estimate, MB | measured, MB | ratio | peak |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases():
        said, when = estimated(case)
        found = measure(case)
        model = f"{case.model.get('form', 'gpt_neox')}, {case.model['vocab_size']}"
        model += ", tied" if case.model.get("tie_embeddings") else ""
        engine = ", ".join(f"{key}={value}" for key, value in case.engine.items()) or "native"
        batch = f"{case.micro_batches} x {case.micro_batch_size}"
        print(
            f"| {model} | {engine} | {case.ranks} | {batch} | {said / 1e6:.1f} | {found / 1e6:.1f} | "
            f"{said / found:.3f} | {when} |",
            flush=True,
        )


SEQUENCE = 2048
PLANS: list[tuple[str, int, str, int]] = [
    ("405m", 1, "", 8),
    ("405m", 1, "", 16),
    ("405m", 1, "activation_checkpointing=selective", 16),
    ("405m", 1, "activation_checkpointing=full", 32),
    ("1b", 1, "", 4),
    ("1b", 1, "activation_checkpointing=selective", 8),
    ("1b", 1, "activation_checkpointing=full", 16),
    ("1b", 8, "kind=deepspeed zero_stage=2", 16),
    ("llama-1b", 8, "kind=deepspeed zero_stage=2", 8),
    ("llama-8b", 8, "kind=deepspeed zero_stage=2 activation_checkpointing=full", 2),
    ("llama-8b", 8, "kind=deepspeed zero_stage=3 activation_checkpointing=full", 8),
    ("llama-8b", 16, "kind=deepspeed zero_stage=3 activation_checkpointing=selective", 2),
    ("llama-8b", 64, "kind=deepspeed zero_stage=2 activation_checkpointing=selective", 4),
    ("10b", 8, "kind=deepspeed zero_stage=2 offload_optimizer=true activation_checkpointing=full", 2),
    ("10b", 8, "kind=deepspeed zero_stage=3 activation_checkpointing=full", 4),
    ("10b", 16, "kind=deepspeed zero_stage=3 activation_checkpointing=full", 8),
    ("10b", 64, "kind=deepspeed zero_stage=2 activation_checkpointing=full", 4),
    ("10b", 64, "kind=deepspeed zero_stage=2 tensor_parallel=2 activation_checkpointing=full", 8),
    ("10b", 64, "kind=deepspeed zero_stage=2 tensor_parallel=4 activation_checkpointing=selective", 8),
    ("10b", 64, "kind=deepspeed zero_stage=2 tensor_parallel=4", 4),
    ("10b", 64, "kind=deepspeed zero_stage=3 activation_checkpointing=selective", 4),
]
"""Model, GPUs, engine settings beside precision=bf16, and sequences of a micro batch, of SEQUENCE tokens."""
CARDS = (40, 80)
"""GB of GPU memory; a tenth of it is left to CUDA's context, to libraries and to what the allocator cannot use."""


def plans() -> None:
    """Prints what each of PLANS takes on a GPU, and which card it fits, in Markdown."""
    from pydantic import TypeAdapter

    from megacl.config import EngineConfig
    from megacl.configfile import load_tree
    from megacl.memory import estimate_memory
    from megacl.model.config import ModelConfig

    print("| model | GPUs | engine | sequences | weights | optimizer | at most, GB | when | fits |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, gpus, settings, rows in PLANS:
        model = TypeAdapter(ModelConfig).validate_python(load_tree([f"model/{name}.yaml"])["model"])
        tree = load_tree([], [f"engine.{setting}" for setting in settings.split()])
        engine = TypeAdapter(EngineConfig).validate_python({"precision": "bf16", **tree.get("engine", {})})
        found = estimate_memory(
            model, engine, seq_length=SEQUENCE, micro_batch_size=rows, micro_batches=2, ranks=gpus, device="cuda"
        )
        peak = found.peak
        fits = next((f"{card} GB" for card in CARDS if peak.total <= 0.9e9 * card), "-")
        host = f" (and {found.host / 1e9:.0f} on the host)" if found.host else ""
        print(
            f"| {name} | {gpus} | {settings.replace(' ', ', ') or 'native'} | {rows} | {peak.parameters / 1e9:.1f} | "
            f"{peak.optimizer / 1e9:.1f}{host} | {peak.total / 1e9:.1f} | {peak.when} | {fits} |"
        )


def main() -> None:
    """Prints the table, one case of it, or what this process measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="one case, as JSON: estimate and measurement in bytes")
    parser.add_argument("--table", action="store_true", help="estimates for models on GPUs, without measuring")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(run_case(Case(**json.loads(asked.measure))))
    elif asked.table:
        plans()
    elif asked.case:
        case = Case(**json.loads(asked.case))
        print(estimated(case)[0], measure(case))
    else:
        table()


if __name__ == "__main__":
    main()
