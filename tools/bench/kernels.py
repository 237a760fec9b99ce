"""Every op in every implementation that runs here: time forward and backward, beside the machine's limit.

    python tools/bench/kernels.py                      # shapes as the CPU or GPU here makes sense of
    python tools/bench/kernels.py --tokens 512 --hidden 64 --vocab 1000 --compiled --repeats 5

Implementations take turns, and each line has the least time of all turns; with one thread (OMP_NUM_THREADS=1) of a CPU
that is the process's own time, which other processes lengthen less. An op that only moves memory has the bytes
that it must move, read and written once each, a second, and their share of the machine's copy bandwidth; one that
multiplies has its products' floating-point operations a second and their share of the machine's rate for a product.
`kept` is what stays in memory for backward, parameters aside. rotary_attention 16x256/6 is of 16 rows of 256 tokens
with 6 key heads. The last lines are a step's update: the gradient's norm, clipping, AdamW. --compiled adds
torch.compile of the reference; on a GPU liger-kernel's ops stand beside ours where it is installed. A CPU computes in
fp32, a GPU in bf16.
"""

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacl import kernels
from megacl.engine.heap import keep_freed_blocks

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """An op with its arguments and the least work that its way forward and backward can be."""

    op: str
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    bytes_moved: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Row:
    """What was measured of one implementation."""

    op: str
    implementation: str
    forward_ms: float
    both_ms: float
    kept_mib: float
    rate: float  # of what the case counts, a second
    share: float  # of the machine's rate


@dataclass(frozen=True)
class Limits:
    """Of this machine: bytes read and written a second by a copy, and operations a second of a product."""

    bandwidth: float
    flops: float


def cases(tokens: int, hidden: int, vocab: int, *, device: str, dtype: torch.dtype) -> list[Case]:
    """The ops as a model of this width has them: heads of 64, MLPs of 4 x hidden (GELU) and 8/3 x hidden (SwiGLU)."""

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    heads, inner = hidden // 64, 8 * hidden // 3 // 64 * 64
    length = min(tokens, 2048)
    size = torch.empty(0, dtype=dtype).itemsize
    x, residual, weight, bias = values(tokens, hidden), values(tokens, hidden), values(hidden), values(hidden)
    qkv_BTHE = values(tokens // length, length, 3 * heads, 64)
    qk_BHTE = qkv_BTHE[:, :, : 2 * heads].transpose(1, 2)
    angles_TR = torch.randn(length, 32, device=device)
    whole, quarter = ((angles_TR[:, :r].cos(), angles_TR[:, :r].sin()) for r in (32, 8))
    quarter_TR = [table[:256] for table in quarter]
    short_BTHE = values(tokens // min(tokens, 256), min(tokens, 256), 3 * heads, 64)
    row_BTHE = values(1, length, heads + 2, 64)  # one row with one key head: what threads share out least easily
    targets = torch.randint(vocab, (tokens,), device=device)
    head = (0.02 * values(vocab, hidden)).detach().requires_grad_()
    return [
        Case("rms_norm", (x, weight, EPS, residual), {}, bytes_moved=8 * x.numel() * size),
        Case("layer_norm", (x, weight, bias, EPS, residual), {}, bytes_moved=8 * x.numel() * size),
        Case("rotary", (qk_BHTE, *whole), {}, bytes_moved=4 * qk_BHTE.numel() * size),
        Case("rotary", (qk_BHTE, *quarter), {}, bytes_moved=4 * qk_BHTE.numel() * size),
        *(
            Case(
                "rotary_attention",
                (qkv, *turns, None, kv_heads, 64**-0.5),
                {},
                flops=6 * qkv.shape[0] * qkv.shape[1] ** 2 * hidden,  # of the causal half
            )
            for qkv, turns, kv_heads in (
                (short_BTHE, quarter_TR, heads),
                (qkv_BTHE, quarter, heads),
                (row_BTHE, quarter, 1),
            )
        ),
        Case("swiglu", (values(tokens, 2 * inner),), {}, bytes_moved=8 * tokens * inner * size),
        Case("linear", (x, values(hidden, hidden), bias), {}, flops=3 * 2 * tokens * hidden * hidden),
        Case(
            "linear_gelu",
            (x, values(4 * hidden, hidden), values(4 * hidden)),
            {},
            flops=3 * 2 * tokens * hidden * 4 * hidden,
        ),
        Case(
            "linear_cross_entropy",
            (x, head, targets),
            {"chunk": min(tokens, kernels.LOSS_CHUNK[device]), "z_loss": 0.0},
            flops=3 * 2 * tokens * hidden * vocab,
        ),
    ]


def implementations(case: Case, *, device: str, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Those of ours that run here, and others' beside them."""
    found: dict[str, Callable[..., Any]] = {
        name: form for name, form in kernels.FORMS[case.op].items() if form is not None
    }
    if device == "cpu":
        found.pop("triton", None)  # it would be interpreted
    if device != "cpu" or not kernels.onednn.available():
        found.pop("onednn", None)
    if device != "cpu" or kernels.c_library.unavailable():
        found.pop("c", None)
    if case.op == "rotary_attention":
        found["apart"] = functools.partial(rotary_and_attention, kernels_here(device))
    if compiled:
        found["compiled"] = torch.compile(kernels.FORMS[case.op]["reference"], dynamic=False)
    partial = case.op == "rotary" and 2 * case.inputs[1].shape[-1] < case.inputs[0].shape[-1]
    if device == "cuda" and not partial and (liger := liger_op(case.op)):  # liger turns whole heads
        found["liger"] = liger
    return found


def kernels_here(device: str) -> kernels.Kernels:
    """What would run here in the dtype that is measured."""
    return kernels.choose_kernels(device=device, half=device == "cuda", compiled=False, overrides={})


def rotary_and_attention(
    ops: kernels.Kernels, qkv_BTHE: Tensor, cos: Tensor, sin: Tensor, _: None, kv_heads: int, scale: float
) -> Tensor:
    """The parts of rotary_attention as a model's layer puts them together."""
    heads = qkv_BTHE.shape[2] - 2 * kv_heads
    qk_BHTE, v_BKTE = (x.transpose(1, 2) for x in torch.split(qkv_BTHE, [heads + kv_heads, kv_heads], dim=2))
    q_BHTE, k_BKTE = torch.split(ops.rotary(qk_BHTE, cos, sin), [heads, kv_heads], dim=1)
    mixed: Tensor = ops.attention(q_BHTE, k_BKTE, v_BKTE, scale).transpose(1, 2).flatten(2)
    return mixed


def liger_op(op: str) -> Callable[..., Any] | None:
    """liger-kernel's op with our signature, or None where there is none. They are not tested here: they need a GPU."""
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError:
        return None

    def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Any:
        return liger.liger_fused_add_rms_norm(x, residual, weight, eps)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor) -> Any:
        total = x + residual
        return liger.liger_layer_norm(total, weight, bias, eps), total

    def rotary(x_BHTE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        q, k = x_BHTE.chunk(2, dim=1)
        cos, sin = (torch.cat([table, table], -1)[None] for table in (cos_TR, sin_TR))
        return torch.cat(liger.liger_rope(q, k, cos, sin), dim=1)

    def swiglu(gate_up: Tensor) -> Tensor:
        result: Tensor = liger.liger_swiglu(*gate_up.chunk(2, dim=-1))
        return result

    def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, **_: Any) -> Any:
        return liger.liger_fused_linear_cross_entropy(x, weight, targets, reduction="sum")

    ops: dict[str, Callable[..., Any]] = {
        "rms_norm": rms_norm,
        "layer_norm": layer_norm,
        "rotary": rotary,
        "swiglu": swiglu,
        "linear_cross_entropy": cross_entropy,
    }
    return ops.get(op)


def runs(case: Case, op: Callable[..., Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The way forward, and the way forward and backward."""
    wanted = [x for x in case.inputs if isinstance(x, Tensor) and x.requires_grad]

    def forward() -> Any:
        return op(*case.inputs, **case.options)

    def results() -> list[Tensor]:
        y = forward()
        return [r for r in (y if isinstance(y, tuple) else (y,)) if isinstance(r, Tensor)]

    coming = [torch.ones_like(r) for r in results()]
    return forward, lambda: torch.autograd.grad(results(), wanted, coming, allow_unused=True)


def kept_bytes(case: Case, forward: Callable[[], Any]) -> int:
    """What forward keeps for backward: each piece of memory once, parameters aside."""
    parameters = {x.untyped_storage().data_ptr() for x in case.inputs[1:] if isinstance(x, Tensor) and x.is_leaf}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # held, so that memory is not used twice
        del result
    return sum(kept.values())


@functools.cache
def _flushed() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def seconds(run: Callable[[], Any], device: str) -> float:
    """Of one call; on a GPU with nothing of its inputs in the cache, on one thread of a CPU without waiting for it."""
    if device == "cuda":
        _flushed().zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    run()
    return clock() - begun


def least(runs: dict[Any, Callable[[], Any]], repeats: int, device: str) -> dict[Any, float]:
    """The least seconds of each, which take turns; the first turn warms up."""
    turns = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(repeats + 1)]
    return {name: min(turn[name] for turn in turns[1:]) for name in runs}


def measure_limits(tokens: int, hidden: int, *, device: str, dtype: torch.dtype, repeats: int) -> Limits:
    """By a copy of as many values as the MLP has, and a product as large as the MLP's, of the faster library."""
    x, w = (torch.randn(n, m, device=device, dtype=dtype) for n, m in ((tokens, hidden), (hidden, 4 * hidden)))
    source = torch.empty(
        max(tokens * 4 * hidden, (1 << 28 if device == "cuda" else 1 << 24)), device=device, dtype=dtype
    )
    target = torch.empty_like(source)
    product = torch.empty(tokens, 4 * hidden, device=device, dtype=dtype)
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.mm(x, w, out=product),
    }
    if device == "cpu" and kernels.onednn.available():
        weight_FD = w.t().contiguous()
        calls["onednn"] = lambda: kernels.onednn.linear(x, weight_FD)
    times = least(calls, repeats, device)
    product_seconds = min(seconds for name, seconds in times.items() if name != "copy")
    return Limits(2 * source.nbytes / times["copy"], 2 * tokens * hidden * 4 * hidden / product_seconds)


def measure(case: Case, limits: Limits, *, device: str, compiled: bool, repeats: int) -> list[Row]:
    """A row for each implementation, the fastest first."""
    ways = {name: runs(case, op) for name, op in implementations(case, device=device, compiled=compiled).items()}
    calls = {(name, way): call for name, pair in ways.items() for way, call in enumerate(pair)}
    times = least(calls, repeats, device)
    work, limit = (case.bytes_moved, limits.bandwidth) if case.bytes_moved else (case.flops, limits.flops)
    rows = []
    for name, (forward, _) in ways.items():
        both = times[name, 1]
        kept = kept_bytes(case, forward) / 2**20
        rows.append(Row(case.op, name, 1e3 * times[name, 0], 1e3 * both, kept, work / both, work / both / limit))
    return sorted(rows, key=lambda row: row.both_ms)


def measure_update(hidden: int, vocab: int, limits: Limits, *, device: str, repeats: int) -> list[Row]:
    """The norm of the gradient, clipping and AdamW over fp32 weights: those of four layers, embedding and head."""
    shapes = [(vocab, hidden)] * 2 + [(3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden,)] * 4
    parameters = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    ours, fused, foreach = (
        torch.optim.AdamW(parameters, lr=1e-4, **how) for how in ({"fused": True}, {"fused": True}, {"foreach": True})
    )

    def in_one_pass() -> None:  # as the native engine
        norm = torch.nn.utils.get_total_norm(gradients)
        ours.grad_scale, ours.found_inf = norm.clamp(min=1.0), (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        ours.step()

    def clip_then(optimizer: torch.optim.AdamW) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    ways: dict[str, Callable[[], Any]] = {
        "megacl": in_one_pass,
        "clip, fused": functools.partial(clip_then, fused),
        "clip, foreach": functools.partial(clip_then, foreach),
    }
    times = least(ways, repeats, device)
    # The norm reads the gradient; the update reads weight, gradient and moments, and writes all but the gradient.
    work = 8 * 4 * sum(parameter.numel() for parameter in parameters)
    rows = [
        Row("clip and adamw", name, 1e3 * took, 1e3 * took, 0.0, work / took, work / took / limits.bandwidth)
        for name, took in times.items()
    ]
    return sorted(rows, key=lambda row: row.both_ms)


def line_of(row: Row, label: str, unit: str) -> str:
    return (
        f"{label:30}{row.implementation:16}{row.forward_ms:7.2f} ms{row.both_ms:7.2f} ms"
        f"{row.kept_mib:6.1f} MiB{row.rate / 1e9:10.1f} {unit:7}{row.share:7.2f}"
    )


def main() -> None:
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    parser = argparse.ArgumentParser(description="Times every op in every implementation that runs here.")
    parser.add_argument("--tokens", type=int, default=16384 if gpu else 4096, help="tokens of a micro batch")
    parser.add_argument("--hidden", type=int, default=1024 if gpu else 384, help="a multiple of 64")
    parser.add_argument("--vocab", type=int, default=50304 if gpu else 8192, help="rows of the output layer")
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the references as well")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 10, help="turns")
    chosen = parser.parse_args()
    if not gpu:
        keep_freed_blocks()  # as the engine does
    limits = measure_limits(chosen.tokens, chosen.hidden, device=device, dtype=dtype, repeats=chosen.repeats)
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{name}, {dtype}, {chosen.tokens} tokens, hidden {chosen.hidden}, vocabulary {chosen.vocab}")
    print(f"copy {limits.bandwidth / 1e9:.1f} GB/s, product {limits.flops / 1e9:.1f} GFLOP/s")
    print(f"{'op':30}{'implementation':16}{'forward':>10}{'and back':>10}{'kept':>10}{'rate':>18}{'share':>7}")
    for case in cases(chosen.tokens, chosen.hidden, chosen.vocab, device=device, dtype=dtype):
        part = ""
        if case.op == "rotary":
            part = f" {2 * case.inputs[1].shape[-1]}/64"
        elif case.op == "rotary_attention":
            rows, length, *_ = case.inputs[0].shape
            part = f" {rows}x{length}/{case.inputs[4]}"
        unit = "GB/s" if case.bytes_moved else "GFLOP/s"
        for row in measure(case, limits, device=device, compiled=chosen.compiled, repeats=chosen.repeats):
            print(line_of(row, row.op + part, unit), flush=True)
    for row in measure_update(chosen.hidden, chosen.vocab, limits, device=device, repeats=chosen.repeats):
        print(line_of(row, row.op, "GB/s"), flush=True)


if __name__ == "__main__":
    main()
