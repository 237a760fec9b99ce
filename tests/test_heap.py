"""Freed memory stays with a process that trains."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of glibc")

PROGRAM = """
import pathlib, torch
from megacl.engine.heap import keep_freed_blocks
{call}
def pages():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])
before = pages()
block = torch.ones(64 * 2**20)
del block
print((pages() - before) * 4096 // 2**20)
"""


def megabytes_held(call: str, **environment: str) -> int:
    """What a process of its own holds of a freed block of 256 MB."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    here = {**clean, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    return int(subprocess.run(command, env=here, capture_output=True, text=True, check=True).stdout)


def test_a_freed_block_stays_with_the_process():
    assert megabytes_held("") < 50
    assert megabytes_held("keep_freed_blocks()") > 200


def test_what_the_environment_tells_malloc_is_left_alone():
    assert megabytes_held("keep_freed_blocks()", MALLOC_MMAP_THRESHOLD_="1048576") < 50
