"""The benchmark of kernels runs; its figures are not tested."""

import os
import subprocess
import sys
from pathlib import Path

from megacl import kernels

BENCH = Path(__file__).parents[1] / "tools" / "bench" / "kernels.py"


def test_every_implementation_of_this_device_has_its_line():
    sizes = ["--tokens", "512", "--hidden", "128", "--vocab", "50", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, BENCH, *sizes], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    of_attention = (" 2x256/2", " 1x512/2", " 1x512/1")  # rows, tokens and key heads
    for part in of_attention:
        assert sum(line.startswith(f"rotary_attention{part} ") for line in done.stdout.splitlines()) >= 2
    parts = (" 64/64", " 16/64", *of_attention)  # of a head that is turned
    lines = set()
    for line in done.stdout.splitlines():
        for part in parts:
            line = line.replace(part, " ")
        lines.add(tuple(line.split()[:2]))
    assert any(line.startswith("clip and adamw  ") for line in done.stdout.splitlines())
    built = kernels.c_library.unavailable() is None
    for op in ("rms_norm", "layer_norm", "rotary", "rotary_attention", "swiglu", "linear_gelu", "linear_cross_entropy"):
        assert {(op, form) for form in kernels.FORMS[op] if form != "triton" and (built or form != "c")} <= lines
