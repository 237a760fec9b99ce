"""The samples of a run's steps as text: what the model read where its loss jumped.

    for read in samples_of_steps(Path("runs/x"), 100, 103):     # optimizer steps 100, 101, 102 and 103
        print(read.step, read.source, read.start, read.documents)

Order is arithmetic, so that config.yaml, lineage.json and the sources are enough, for every phase that has begun.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacl.config import RunConfig
from megacl.configfile import load
from megacl.data.order import Int64
from megacl.data.packing import PADDING
from megacl.data.source import Source, open_source
from megacl.data.store import ShardCache
from megacl.data.stream import PhaseStream, open_recorded
from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.errors import ConfigError, DataError
from megacl.lineage import Lineage, load_lineage
from megacl.resume import shard_cache


@dataclass(frozen=True)
class ReadSample:
    """One sample that a run has read, or will read if that step is still to come."""

    step: int
    """Of the run, as in metrics.jsonl."""
    phase: str
    sample: int
    """Its index in the phase."""
    passed_over: bool
    """Whether the model has not learned from it: its update was skipped or undone."""
    replayed: bool
    replayed_phase: str | None
    """The earlier phase whose sample it was; null where it is new, or replayed from a source by name."""
    source: str
    start: int | None
    """Where in the source's training stream its first token lies; cut anew, it may go on elsewhere. Null: see `row`."""
    row: int | None
    """Which of the source's packed rows it is (data/packing.py); null where it is cut from the stream."""
    documents: list[str]
    """The text of its tokens, the one after the last that is read included, divided where documents end."""


def samples_of_steps(run_dir: Path, first: int, last: int) -> Iterator[ReadSample]:
    """The samples of a run's optimizer steps `first` to `last`, both included, step by step.

    Raises CheckpointError where there is no run, ConfigError for steps outside the phases that have begun, DataError
    where a source is gone or is other data now.
    """
    lineage = load_lineage(run_dir)
    config = load([str(run_dir / "config.yaml")])
    own = {phase.name for phase in config.phases}
    begun = [(index, record) for index, record in enumerate(lineage.phases) if record.name in own]
    steps = sum(record.budget_steps for _, record in begun)
    if not 1 <= first <= last <= steps:
        raise ConfigError(
            f"{run_dir}: there are no steps {first} to {last}; the phases that have begun have steps 1 to {steps}."
        )
    cache = shard_cache(config)
    tokenizer_of = functools.cache(load_tokenizer)
    before = 0
    for index, record in begun:
        since, until = max(first - before, 1), min(last - before, record.budget_steps)
        if since <= until:
            stream = PhaseStream(
                Lineage(phases=lineage.phases[: index + 1]),
                lambda wanted: open_recorded(wanted, configured_sources(config, wanted.name, cache), cache),
            )
            for step in range(since, until + 1):
                yield from _samples_of_step(stream, lineage, step, before + step, tokenizer_of)
        before += record.budget_steps


def configured_sources(config: RunConfig, likely: str, cache: ShardCache | None) -> Iterator[Source]:
    """The sources of a configuration as far as they are there, opened one by one, the likely one first."""
    for _, source in sorted(config.sources.items(), key=lambda item: item[0] != likely):
        with contextlib.suppress(DataError):  # said by open_recorded, if it is the one that is wanted
            yield open_source(source.path, source.generation, source.since, cache)


def _samples_of_step(
    stream: PhaseStream, lineage: Lineage, step: int, step_of_run: int, tokenizer_of: Callable[[Path], Tokenizer]
) -> Iterator[ReadSample]:
    record = stream.record
    names = {fingerprint: source.name for fingerprint, source in lineage.sources.items()}
    samples = np.arange((step - 1) * record.global_batch_size, step * record.global_batch_size, dtype=np.int64)
    located, tokens = stream.locate(samples), stream.read(samples)
    for row, sample in enumerate(samples.tolist()):
        source, phase = stream.sources[int(located.source[row])], int(located.phase[row])
        packed = (lineage.phases[phase] if phase >= 0 else record).packing == "best_fit"
        start = int(located.start[row])
        yield ReadSample(
            step=step_of_run,
            phase=record.name,
            sample=sample,
            passed_over=any(first <= sample < end for first, end in record.passed_over),
            replayed=bool(located.replayed[row]),
            replayed_phase=lineage.phases[phase].name if located.replayed[row] and phase >= 0 else None,
            source=names[source.fingerprint],
            start=None if packed else start,
            row=start if packed else None,
            documents=_documents(tokens[row], tokenizer_of(source.tokenizer_file)),
        )


def _documents(tokens: Int64, tokenizer: Tokenizer) -> list[str]:
    tokens = tokens[tokens != PADDING]
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)
    return [tokenizer.decode(part) for part in parts if part.size]
