"""The Triton kernels through the real compiler, for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = Path(__file__).parents[1] / "compile_kernels.py"


@pytest.mark.parametrize("capability", ["90", pytest.param("80", marks=pytest.mark.long)])
def test_every_kernel_compiles_for_a_gpu_keeps_to_its_registers_and_moves_16_bytes_at_a_time(tmp_path, capability):
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        pytest.skip("this Triton cannot compile for NVIDIA's GPUs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(COMPILER), capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in compiled} == {
        "triton_norms._forward",
        "triton_norms._backward",
        "triton_rotary._rotate",
        "triton_swiglu._forward",
        "triton_swiglu._backward",
        "triton_gelu._forward",
        "triton_gelu._backward",
        "triton_cross_entropy._softmax",
    }
    assert [each for each in compiled if each["spilled"] or each["widest"] != 16] == []
    # A sum behind the softmax's maximum is of the values themselves; what GELU is made of has but passed through.
    assert {each["kernel"] for each in compiled if each["drops_nan"]} == {"triton_cross_entropy._softmax"}
