"""What the dry run says of memory: `megacl train CONFIG --dry-run --ranks N --device cuda`."""

import os
from collections.abc import Iterator

import torch

from megacl.config import RunConfig
from megacl.engine import Device
from megacl.memory import MemoryEstimate, estimate_memory


def memory_lines(config: RunConfig, ranks: int, device: Device) -> Iterator[str]:
    """What a step takes on one of the ranks, in the phase in which it takes most, beside what there is of it here."""
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
            device=device,
        )
    phase_name, estimate = max(found.items(), key=lambda item: item[1].peak.total)
    yield f"memory{'' if ranks == 1 else f' on each of {ranks} ranks'}, in phase {phase_name}:"
    yield from (f"  {line}" for line in estimate.table())
    place, has = "GPU" if device == "cuda" else "machine", _memory_of(device)
    peak = estimate.peak
    beside = f"; this {place} has {has / 1e9:.1f} GB" if has else ""
    yield f"  {peak.total / 1e9:.2f} GB at most ({peak.when}), without Python and its libraries{beside}"
    if estimate.host:
        yield f"  and {estimate.host / 1e9:.2f} GB of the host's memory"
    if has and peak.total > has:
        yield f"  warning: more than this {place} has; see docs/parallelism.md for what makes it less"


def _memory_of(device: Device) -> int | None:
    """Bytes that the device has, or None where there is none here."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
