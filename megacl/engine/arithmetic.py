"""How a process computes: torch's own switches for precision and determinism, which hold for all of the process.

    set_arithmetic(config.engine, device="cuda")       # where an engine is built

fp32 is fp32 on a GPU too. What an engine before this one in the process had set is set anew.
"""

import os
import time
from typing import Literal

import torch

from megacl.config import EngineConfig

Device = Literal["cpu", "cuda"]


def device_here() -> Device:
    """What an engine of this process computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(precision: str) -> torch.dtype:
    """In which matrix products of that precision have their factors; tf32 is a way to multiply fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def set_arithmetic(config: EngineConfig, *, device: Device) -> list[str]:
    """Sets how fp32 matrix products are computed, and whether only deterministic operations may run.

    Returns what is to be known of the precision on a CPU: that it changes nothing there, or is slower than fp32.
    """
    tf32 = config.precision == "tf32" and device == "cuda"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if config.deterministic:
        # cuBLAS reads it when it is first used; either of its two values makes it deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:  # the call imports PyTorch's compiler
        torch.use_deterministic_algorithms(config.deterministic)
    # A help for debugging, which would fill every buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return _notices(config) if device == "cpu" else []


def _notices(config: EngineConfig) -> list[str]:
    precision = config.precision
    if precision == "tf32":
        return ["engine.precision tf32 changes nothing on a CPU: it computes in fp32."]
    if config.half:
        slower = slowdown(dtype_of(precision))
        if slower > 1.2:  # what two measurements of one thing may differ by
            return [f"engine.precision {precision} is {slower:.1f} times as slow as fp32 in a product on this CPU."]
    return []


def slowdown(dtype: torch.dtype, size: int = 256) -> float:
    """How many times as long as in fp32 a small matrix product takes in `dtype` on this CPU. It is measured, in ms."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(4):  # the first one makes ready
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return seconds(dtype) / seconds(torch.float32)
