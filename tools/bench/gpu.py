"""The whole table of a machine with GPUs, in one command. It has not been run on a GPU yet.

    python tools/bench/gpu.py                  # 405M parameters, 2,048 tokens, bf16; minutes on an H100
    python tools/bench/gpu.py --shape tiny     # the same code on whatever is here, a CPU too: its figures mean nothing

Four parts, all in Markdown and of one run:

    training     tokens/s at micro batches of 8, 16 and 32 sequences, compiled and not; model FLOP/s (`flops_per_token`)
                 as a part of the GPU's peak; peak memory of tensors beside what `estimate_memory` says; beside it
                 transformers' GPT-NeoX of the same shape, compiled, with fused AdamW, where that package is installed
    kernels      what tools/bench/kernels.py prints: each op as a part of memory bandwidth or of the rate of a product,
                 liger-kernel's beside it where that is installed
    all-reduce   of 1 GiB by NCCL, where there are several GPUs: bus bandwidth, 2 (n - 1) / n x bytes / second

Each row of the first part is a process of its own. A row that does not fit into memory says so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import build_engine, device_here
from megacl.memory import estimate_memory
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model, flops_per_token
from megacl.parallel.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by NVIDIA's data sheets, by what a GPU's name contains; the first that fits."""
WARM, STEPS = 3, 10
SHAPES: dict[str, dict[str, Any]] = {
    "405m": {
        "model": {"vocab_size": 50304, "hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16},
        "seq_length": 2048,
        "micro_batches": [8, 16, 32],
    },
    "tiny": {
        "model": {"vocab_size": 128, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 2},
        "seq_length": 16,
        "micro_batches": [2],
    },
}


# ---------------------------------------------------------------------------------------------- in a process of its own


def megacl_row(shape: dict[str, Any], micro_batch: int, *, compiled: bool) -> dict[str, float]:
    """Seconds of a step, bytes of tensors at its peak and as estimated; on a CPU memory is not measured."""
    config = ModelConfig(**shape["model"])
    engine = EngineConfig(precision="bf16" if device_here() == "cuda" else "fp32", compile=compiled)
    built = build_engine(
        build_model(config, seed=0, device="meta"), engine=engine, optimizer=OptimizerConfig(), ranks=Ranks()
    )
    rows = torch.randint(0, config.vocab_size, (micro_batch, shape["seq_length"] + 1)).numpy()
    seconds = median_seconds(lambda: built.step(rows, 3e-4))
    estimate = estimate_memory(
        config, engine, seq_length=shape["seq_length"], micro_batch_size=micro_batch, device=device_here()
    )
    return {"seconds": seconds, "estimated": estimate.peak.total, **peak_memory()}


def transformers_row(shape: dict[str, Any], micro_batch: int) -> dict[str, float]:
    """The same of transformers' model as its users train it: bf16 by autocast, compiled, one parameter group."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model_shape = shape["model"]
    config = GPTNeoXConfig(
        vocab_size=model_shape["vocab_size"],
        hidden_size=model_shape["hidden_size"],
        num_hidden_layers=model_shape["num_layers"],
        num_attention_heads=model_shape["num_attention_heads"],
        intermediate_size=4 * model_shape["hidden_size"],
        max_position_embeddings=shape["seq_length"],
        use_cache=False,
    )
    model = GPTNeoXForCausalLM(config).to(device_here())
    forward = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = torch.randint(0, model_shape["vocab_size"], (micro_batch, shape["seq_length"]), device=device_here())

    def step() -> None:
        with torch.autocast(device_here(), torch.bfloat16, enabled=device_here() == "cuda"):
            loss = forward(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"seconds": median_seconds(step), **peak_memory()}


def median_seconds(step: Callable[[], object]) -> float:
    found = []
    for _ in range(WARM + STEPS):
        synchronize()
        begun = time.perf_counter()
        step()
        synchronize()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[WARM:])


def synchronize() -> None:
    if device_here() == "cuda":
        torch.cuda.synchronize()


def peak_memory() -> dict[str, float]:
    return {"peak": torch.cuda.max_memory_allocated()} if device_here() == "cuda" else {}


def all_reduce(rank: int, ranks: int, elements: int, port: int) -> None:
    """One rank of the last part; rank 0 prints its row."""
    import torch.distributed as dist

    backend = "nccl" if device_here() == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    if device_here() == "cuda":
        torch.cuda.set_device(rank)
    values = torch.ones(elements, device=device_here())
    seconds = median_seconds(lambda: dist.all_reduce(values))
    if rank == 0:
        bus = 2 * (ranks - 1) / ranks * values.nbytes / seconds
        print(f"| {ranks} ranks, {values.nbytes / 2**20:,.0f} MiB | {1e3 * seconds:.2f} | {bus / 1e9:.1f} |")
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- the table


def one(*arguments: object) -> dict[str, Any]:
    """The JSON that a row's process prints, or why there is none."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return {"failed": "out of memory" if "OutOfMemoryError" in done.stderr else last[:100]}


def peak_flops() -> float | None:
    """Of the GPU here; None where its peak is not known."""
    name = torch.cuda.get_device_name() if device_here() == "cuda" else ""
    return next((peak for part, peak in PEAK.items() if part in name), None)


def print_training(name: str) -> None:
    shape = SHAPES[name]
    peak, flops = peak_flops(), flops_per_token(ModelConfig(**shape["model"]), shape["seq_length"])
    print("| | micro batch | tokens/s | model TFLOP/s | of the peak | peak GiB | estimated GiB |\n|" + "---|" * 7)
    for micro_batch in shape["micro_batches"]:
        for row in ("megacl", "megacl, compile", "transformers, compile"):
            found = one(row, name, micro_batch)
            if "failed" in found:
                print(f"| {row} | {micro_batch} | {found['failed']} |" + " - |" * 4, flush=True)
                continue
            rate = micro_batch * shape["seq_length"] / found["seconds"]
            part = "-" if peak is None else f"{rate * flops / peak:.3f}"
            memory = [f"{found[key] / 2**30:.2f}" if key in found else "-" for key in ("peak", "estimated")]
            cells = [row, str(micro_batch), f"{rate:,.0f}", f"{rate * flops / 1e12:.3f}", part, *memory]
            print(f"| {' | '.join(cells)} |", flush=True)


def print_kernels(name: str) -> None:
    model, seq_length = SHAPES[name]["model"], SHAPES[name]["seq_length"]
    sizes = {"tokens": 8 * seq_length, "hidden": model["hidden_size"], "vocab": model["vocab_size"]}
    options = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "tools/bench/kernels.py"), *options]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def print_all_reduce(name: str) -> None:
    import torch.multiprocessing as multiprocessing

    ranks = torch.cuda.device_count() if device_here() == "cuda" else 2
    if ranks < 2:
        print("one GPU: no all-reduce")
        return
    print("| all-reduce, fp32 | ms | bus GB/s |\n|---|---|---|", flush=True)
    elements = 2**28 if name == "405m" else 2**10
    multiprocessing.spawn(all_reduce, (ranks, elements, 29511), ranks)  # type: ignore[no-untyped-call]


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        row, name, micro_batch = sys.argv[2:]
        if row.startswith("transformers"):
            found = transformers_row(SHAPES[name], int(micro_batch))
        else:
            found = megacl_row(SHAPES[name], int(micro_batch), compiled="compile" in row)
        print(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="405m")
    name = parser.parse_args().shape
    if device_here() == "cpu" and name != "tiny":
        print("there is no GPU here; --shape tiny runs the same code on a CPU.", file=sys.stderr)
        sys.exit(2)
    what = torch.cuda.get_device_name() if device_here() == "cuda" else "a CPU"
    print(f"{what}, PyTorch {torch.__version__}, {asdict(ModelConfig(**SHAPES[name]['model']))}\n")
    print_training(name)
    print(flush=True)
    print_kernels(name)
    print(flush=True)
    print_all_reduce(name)


if __name__ == "__main__":
    main()
