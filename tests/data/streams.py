"""Sources for tests whose tokens say where they lie: token p of source s is s * 100,000 + p."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from megacl.config_phase import PhaseConfig
from megacl.configfile import to_tree
from megacl.data.planning import plan_phase
from megacl.data.stream import PhaseStream
from megacl.lineage import Lineage, Ranges

STRIDE = 100_000


class CountingStream:
    """A token stream that holds its own positions."""

    def __init__(self, number: int, tokens: int, documents: int, shards: int) -> None:
        self.number, self.tokens, self.documents = number, tokens, documents
        edges = np.linspace(0, tokens, shards + 1).astype(np.int64)
        self.begins, self.ends = edges[:-1], edges[1:]

    def gather(self, starts: Any, length: int) -> Any:
        assert starts.dtype == np.int64
        assert np.all((starts >= 0) & (starts + length <= self.tokens))
        return self.number * STRIDE + starts[:, None] + np.arange(length)


def counting_source(number: int, tokens: int, documents: int = 1, shards: int = 1, window: int | None = None) -> Any:
    train = CountingStream(number, tokens, documents, shards)
    return source_of(train, f"s{number}", f"fingerprint-{number}-{tokens}", window=window)


def source_of(train: Any, name: str, fingerprint: str, **more: Any) -> Any:
    """A source whose training stream is given."""
    return SimpleNamespace(
        name=name,
        path=f"/data/{name}",
        folder=Path(f"/data/{name}"),
        generation=1,
        since=0,
        fingerprint=fingerprint,
        tokenizer_fingerprint="tokenizer",
        train=train,
        **more,
    )


def phase_config(name: str, mixture: dict[str, float], steps: int, **more: Any) -> PhaseConfig:
    from pydantic import TypeAdapter

    tree = {
        "name": name,
        "mixture": mixture,
        "steps": steps,
        "schedule": {"kind": "constant", "max_lr": 1e-3},
        **more,
    }
    return TypeAdapter(PhaseConfig).validate_python(tree)


def begin(
    lineage: Lineage,
    phase: PhaseConfig,
    sources: dict[str, Any],
    *,
    seq_length: int,
    batch: int,
    seed: int = 0,
    packing: Literal["cut", "best_fit"] = "cut",
) -> PhaseStream:
    """The stream of a phase that begins after `lineage`."""
    assert phase.steps is not None
    record = plan_phase(
        lineage,
        phase,
        sources,
        run="test",
        seed=seed,
        seq_length=seq_length,
        packing=packing,
        global_batch_size=batch,
        steps=phase.steps,
        schedule=to_tree(phase.schedule),
        optimizer_state="new",
        start_lr=0.0,
    )
    by_fingerprint = {source.fingerprint: source for source in sources.values()}
    return PhaseStream(lineage.with_phase(record), lambda wanted: by_fingerprint[wanted.fingerprint])


def finish(
    lineage: Lineage, stream: PhaseStream, samples: int | None = None, passed_over: Ranges | None = None
) -> Lineage:
    """The lineage after the stream's phase, or after its first `samples` samples."""
    samples = stream.record.budget_samples if samples is None else samples
    return lineage.with_phase(stream.seen(samples, 1e-3, passed_over))
