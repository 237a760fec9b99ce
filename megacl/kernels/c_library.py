"""Kernels in C for a CPU, compiled where they run: by the machine's own compiler (GCC 9 or later), once, for the very
processor.

    c_library.load().gelu_forward(...)      # a ctypes.CDLL of megacl/kernels/c; UnavailableError where it cannot be had

The result stays in $XDG_CACHE_HOME/megacl, or ~/.cache/megacl, under a name that the source, the compiler and the
processor decide. Threads are PyTorch's: the library names no OpenMP runtime, so that the one that PyTorch has loaded
already serves it, and a process has no second pool of threads that waits for the same cores.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch  # the OpenMP runtime comes with it

_OPTIONS = ["-O3", "-march=native", "-fwrapv", "-fPIC", "-fopenmp"]
_SECONDS = 120
_SOURCES = Path(__file__).with_name("c")


class UnavailableError(Exception):
    """Why there is no such library here: one line."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, built if it is not there yet."""
    try:
        compiler = shlex.split(os.environ.get("CC") or "cc")
    except ValueError:
        raise UnavailableError(f"CC={os.environ['CC']} is no command") from None
    version = _run([*compiler, "--version"])
    texts = [path.read_text() for path in sorted(_SOURCES.iterdir()) if path.suffix in (".c", ".h")]
    identity = "\n".join([*texts, version, *compiler, *_OPTIONS, _processor()])
    built = _cache() / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    try:
        if not built.exists():
            _build(compiler, built)
    except OSError as problem:
        raise UnavailableError(f"it cannot be built: {problem}") from None
    try:
        return ctypes.CDLL(str(built))
    except OSError as problem:
        raise UnavailableError(f"{problem}; without that file it is built anew") from None


@functools.cache
def unavailable() -> str | None:
    """Why there is no library here; None where there is. The first one to ask has it built."""
    try:
        load()
    except UnavailableError as why:
        return str(why)
    return None


def pointers(*tensors: torch.Tensor | None) -> list[ctypes.c_void_p]:
    """Where they begin in memory, as a function of the library takes them; NULL for None."""
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def rows_and_width(x: torch.Tensor) -> list[ctypes.c_int64]:
    """How many rows of its last dimension x has, and how wide they are, as a function of the library takes them."""
    width = x.shape[-1]
    return [ctypes.c_int64(x.numel() // max(1, width)), ctypes.c_int64(width)]


def _build(compiler: list[str], built: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        objects = []
        for source in sorted(_SOURCES.glob("*.c")):
            objects.append(f"{folder}/{source.stem}.o")
            _run([*compiler, *_OPTIONS, "-c", str(source), "-o", objects[-1]])
        linked = f"{folder}/linked.so"
        _run([*compiler, "-shared", *objects, "-o", linked, "-lm"])  # -fopenmp here would name a runtime
        with open(linked, "rb") as file:
            os.fsync(file.fileno())  # a library that a crash cut short would take the process with it
        if not built.exists():  # another process may have built the same, and run it already
            os.replace(linked, built)


def _run(command: list[str]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except OSError:
        raise UnavailableError(f"no C compiler: there is no {command[0]}") from None
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{command[0]} took more than {_SECONDS} s") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
        raise UnavailableError(f"{command[0]} failed: {said.strip()}")
    return done.stdout


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not root.is_absolute():
        raise UnavailableError("there is no home directory to keep it in; set XDG_CACHE_HOME")
    return root / "megacl"


def _processor() -> str:
    """Its model and what it can do: a home is shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))
