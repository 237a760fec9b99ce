"""What the dry run says of memory: `megacl train CONFIG --dry-run --ranks N --device cuda`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megacl.config import RunConfig
from megacl.engine import Device
from megacl.memory import MemoryEstimate, estimate_memory
from megacl.model.gpt import count_parameters


@dataclass(frozen=True)
class Machine:
    """What a plan is held against: a name that its lines call it by, and its bytes where they are known."""

    name: str
    memory: int | None


def machine_here(device: Device) -> Machine:
    """The GPU or the machine that this process has."""
    return Machine("this GPU" if device == "cuda" else "this machine", _memory_of(device))


def largest_phase(config: RunConfig, ranks: int, device: Device) -> tuple[str, MemoryEstimate]:
    """The phase in which a step takes most on one of the ranks, and what it takes."""
    engine, found = config.engine, dict[str, MemoryEstimate]()
    for phase in config.phases:
        rows = config.batch_size_of(phase) * engine.tensor_parallel * engine.sequence_parallel // ranks
        micro = engine.micro_batch_size or rows
        found[phase.name] = estimate_memory(
            config.model,
            engine,
            seq_length=config.seq_length_of(phase),
            micro_batch_size=micro,
            micro_batches=rows // micro,
            ranks=ranks,
            documents=config.boundaries == "attention",
            reptile=phase.reptile is not None,
            device=device,
        )
    return max(found.items(), key=lambda item: item[1].peak.total)


def memory_lines(config: RunConfig, ranks: int, device: Device, machine: Machine | None = None) -> Iterator[str]:
    """What a step takes on one of the ranks, in the phase in which it takes most, beside what the machine has.

    machine: by default what is here.
    """
    machine = machine or machine_here(device)
    phase_name, estimate = largest_phase(config, ranks, device)
    yield f"memory{'' if ranks == 1 else f' on each of {ranks} ranks'}, in phase {phase_name}:"
    yield from (f"  {line}" for line in estimate.table())
    has, peak = machine.memory, estimate.peak
    beside = f"; {machine.name} has {has / 1e9:.1f} GB" if has else ""
    yield f"  {peak.total / 1e9:.2f} GB at most ({peak.when}), without Python and its libraries{beside}"
    if estimate.host:
        yield f"  and {estimate.host / 1e9:.2f} GB of the host's memory"
    copied = copied_by_saves(config, ranks)
    whose = "its" if device == "cpu" else "the host's"
    yield f"  and {copied / 1e9:.2f} GB of {whose} memory, from which checkpoints are written"
    if has and peak.total + (copied if device == "cpu" else 0) > has:
        yield f"  warning: more than {machine.name} has; see docs/parallelism.md for what makes it less"


def copied_by_saves(config: RunConfig, ranks: int) -> int:
    """Bytes of a rank's share of weights, moments and Reptile's anchor, in fp32, which it keeps from save to save."""
    tensors = 3 + any(phase.reptile is not None for phase in config.phases)
    return 4 * tensors * count_parameters(config.model) // ranks


def host_of_rank(config: RunConfig, estimate: MemoryEstimate, ranks: int, device: Device) -> int:
    """Bytes of a node's memory that a rank takes: its copies of saves, and what no GPU holds."""
    return copied_by_saves(config, ranks) + (estimate.host if device == "cuda" else estimate.peak.total)


def _memory_of(device: Device) -> int | None:
    """Bytes that the device has, or None where there is none here."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
