"""What there is on this machine: space, memory, GPUs and their state, the code that runs.

available_memory()           # Memory(available=..., total=...), of this job where it has a limit of its own
gpu_problems(os.environ)     # what nvidia-smi says of the GPUs that this process may use
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_ASKED = (
    "index",
    "name",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "retired_pages.pending",
    "clocks_throttle_reasons.hw_slowdown",
)
_SILENCE = 30.0
"""Seconds after which nvidia-smi is given up: it hangs where a GPU or its driver does."""
_NO_DEVICES = 6
"""nvidia-smi's exit status where it finds no GPU."""


@dataclass(frozen=True)
class Memory:
    """Of this machine, or of this job where it has less, in bytes."""

    available: int
    total: int


@dataclass(frozen=True)
class Gpus:
    """What is known of this machine's GPUs."""

    problems: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written into a folder, or into the one in which it would be made. Raises OSError."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def available_memory(root: Path = Path("/")) -> Memory | None:
    """The memory that this process may still take, None where the kernel does not say.

    root: where proc and sys lie.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        found = Memory(values["MemAvailable"], values["MemTotal"])
    except (OSError, KeyError, ValueError, IndexError):
        return None
    for limit, used in _limits(root):
        found = Memory(min(found.available, max(0, limit - used)), min(found.total, limit))
    return found


def _limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) of the control groups that this process is in (version 2), as SLURM sets them for a job."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    inside = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = root / "sys/fs/cgroup" / inside.lstrip("/")
    while folder != root / "sys/fs":
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            found.append((limit, used - int(cache.get("file", 0))))  # what files have cached is given up for others
        except (OSError, ValueError):  # no limit: "max"
            pass
        folder = folder.parent
    return found


@functools.cache
def code_versions() -> dict[str, str]:
    """What computes here: megacl by a hash of its files, Python, torch and deepspeed by their versions."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    found = {"megacl": digest.hexdigest()[:12], "Python": platform.python_version()}
    for name in ("torch", "deepspeed"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


# ---------------------------------------------------------------------------------------------- GPUs


def gpu_problems(environment: Mapping[str, str]) -> Gpus:
    """What nvidia-smi says of the GPUs that CUDA_VISIBLE_DEVICES leaves to this job."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return Gpus(unknown=("GPUs (no nvidia-smi)",))
    command = [program, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"]
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if visible and "MIG" not in visible:
        command.append(f"--id={visible}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SILENCE)
    except subprocess.TimeoutExpired:
        return Gpus(problems=(f"nvidia-smi does not answer within {_SILENCE:g} s",))
    except OSError as error:
        return Gpus(unknown=(f"GPUs ({program}: {error.strerror})",))
    return parse_gpus(done.stdout, done.stderr, done.returncode)


def parse_gpus(text: str, complaint: str, status: int) -> Gpus:
    """What nvidia-smi's answer to our question means: its lines, what it said on stderr, its exit status."""
    if status == _NO_DEVICES or "No devices were found" in text + complaint:
        return Gpus(unknown=("GPUs (nvidia-smi finds none)",))
    if "not a valid field" in text + complaint:
        return Gpus(unknown=("the state of GPUs (this nvidia-smi does not know it)",))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if status:
        said = " ".join((text + complaint).split())[:200]
        return Gpus(problems=(f"nvidia-smi fails with status {status}: {said}",))
    problems, unknown = [], set()
    for line in lines:
        fields = [value.strip() for value in line.split(",")]
        if len(fields) != len(_ASKED):
            problems.append(f"nvidia-smi says of a GPU: {line[:200]}")
            continue
        values = dict(zip(_ASKED, fields, strict=True))
        problems += [f"GPU {values['index']} ({values['name']}) {problem}" for problem in _problems_of(values)]
        if not values["ecc.errors.uncorrected.volatile.total"].isdigit():
            unknown.add("ECC errors of GPUs")
    return Gpus(tuple(problems), tuple(sorted(unknown)), (f"{len(lines)} GPUs",))


def _problems_of(values: Mapping[str, str]) -> list[str]:
    found = []
    errors = values["ecc.errors.uncorrected.volatile.total"]
    if any("requires reset" in value.lower() or value == "ERR!" for value in values.values()):
        found.append("must be reset")
    if errors.isdigit() and int(errors):
        found.append(f"has had {int(errors)} memory error(s) that ECC could not correct since its driver was loaded")
    if values["remapped_rows.failure"] == "Yes":
        found.append("has no spare rows left for bad memory")
    if "Yes" in (values["remapped_rows.pending"], values["retired_pages.pending"]):
        found.append("has bad memory that a reset would replace")
    if values["clocks_throttle_reasons.hw_slowdown"] == "Active":
        found.append("is slowed down by its hardware, by heat or power")
    return found
