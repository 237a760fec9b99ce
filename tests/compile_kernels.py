"""Compiles the Triton kernels to a GPU's machine code, without a GPU: what is interpreted well may yet not compile.

    python tests/compile_kernels.py 90        # compute capability 9.0: a line of JSON for each kernel and its arguments

The ops are called with tensors on the CPU, and each kernel that they launch is compiled for just those arguments, and
not run. A line has the kernel's name, its registers a thread, what it spills from registers to memory, the widest of
its loads and stores, in bytes, and how many of its maxima and minima make a number of what is none.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from megacl import kernels

DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class NoDriver:
    """Says which GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_running() -> None:
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([DUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        widths = re.findall(r"(?:ld|st)\.global(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
        widest = max(int(count or 1) * int(bits) // 8 for count, bits in widths)
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        spilled = used["STACK"] + used["LOCAL"]
        line = {"kernel": name, "registers": used["REG"], "spilled": spilled, "widest": widest}
        print(json.dumps(line | {"drops_nan": len(re.findall(r"\b(?:max|min)\.f32", kernel.asm["ptx"]))}))
        return kernel

    JITFunction.run = compile_only


def main() -> None:
    driver.set_active(NoDriver(int(sys.argv[1])))
    compile_instead_of_running()
    forms: dict[str, Any] = {op: form["triton"] for op, form in kernels.FORMS.items() if "triton" in form}
    for dtype in (torch.bfloat16, torch.float32):
        x, weight, bias = (
            torch.ones(*shape, dtype=dtype, requires_grad=True) for shape in ((64, 1024), (1024,), (1024,))
        )
        heads = torch.ones(2, 8, 16, 64, dtype=dtype, requires_grad=True).transpose(1, 2)
        forms["rms_norm"](x, weight, 1e-5, x)[0].sum().backward()
        forms["layer_norm"](x, weight, bias, 1e-5)[0].sum().backward()
        forms["rotary"](heads, torch.ones(8, 8), torch.ones(8, 8)).sum().backward()
        forms["swiglu"](x).sum().backward()
        wide = torch.ones(1024, 16, dtype=dtype, requires_grad=True)
        for tanh in (False, True):
            forms["linear_gelu"](x[:, :16], wide, bias, tanh=tanh).sum().backward()
        targets = torch.ones(1, dtype=torch.int64)
        forms["linear_cross_entropy"](x[:1, :16], torch.ones(50304, 16, dtype=dtype), targets, chunk=1, z_loss=1e-4)


if __name__ == "__main__":
    main()
