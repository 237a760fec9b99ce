"""Loss on held-out documents, per source. What was forgotten meanwhile is transfer.py's.

Every token of a source's held-out documents is predicted exactly once, the documents end to end, the first one after an
end-of-document token; windows of seq_length tokens follow one another without overlap. What a token sees of a window
is what the model saw in training: all before it, or with `boundaries: attention` its own document's part. So

    loss          = nats over all tokens / tokens
    bits per byte = nats over all tokens / ln 2 / UTF-8 bytes of the documents

and models with different tokenizers compare by bits per byte.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from megacl.data.loader import check_tokens
from megacl.data.order import Int64
from megacl.data.source import Source, open_source
from megacl.data.store import ShardCache
from megacl.data.stream import open_recorded
from megacl.data.tokenizer import Tokenizer
from megacl.engine import Engine
from megacl.errors import DataError, MegaclError, UnreachableError
from megacl.heldout import SourceLoss
from megacl.lineage import Lineage
from megacl.parallel.ranks import Ranks


class EvaluationStopped(Exception):  # noqa: N818 - no error
    """An evaluation was told to stop between two batches: on all ranks, at the same one."""


def evaluate_source(
    engine: Engine,
    ranks: Ranks,
    source: Source,
    *,
    seq_length: int,
    micro_batch_size: int,
    sequences: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> SourceLoss:
    """Loss of the model in `engine` on a source's held-out documents; every rank calls it and gets the same result.

    sequences: read no more than the first so many windows. stop: asked before each batch; where it says so on any rank,
    EvaluationStopped is raised on all. Raises DataError, on all ranks, where nothing was held out or a batch cannot be
    read.
    """
    held_out = source.validation.tokens
    if not held_out:
        raise DataError(f"source {source.name!r} ({source.path}) has no held-out documents to evaluate on.")
    windows = -(-held_out // seq_length)
    if sequences is not None:
        windows = min(windows, sequences)
    tokens = min(windows * seq_length, held_out)
    mine = range(ranks.dp_rank, windows, ranks.dp_size)
    # Under ZeRO-3 each forward pass is a collective: all ranks make as many as rank 0, the last ones over nothing.
    batches = math.ceil(windows / ranks.dp_size / micro_batch_size)
    nats = 0.0
    for batch in range(batches):
        some = mine[batch * micro_batch_size : (batch + 1) * micro_batch_size]
        error: MegaclError | None = None
        try:
            inputs, targets = _windows(source, some, seq_length, micro_batch_size)
            check_tokens(targets, engine.vocab_size, source)
        except MegaclError as raised:
            error = raised
        told, failed = ranks.sum(np.array([stop(), error is not None], np.float64))
        if told:
            raise EvaluationStopped
        if failed:
            with ranks.together():
                if error is not None:
                    raise error
        nats += engine.nats(inputs, targets)
    total = float(ranks.sum(np.array([nats]))[0])
    loss = total / tokens
    text_bytes = source.validation.text_bytes * tokens / held_out
    return SourceLoss(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=total / math.log(2) / text_bytes,
        nats=total,
        tokens=tokens,
        text_bytes=text_bytes,
        fingerprint=source.fingerprint,
    )


def _windows(source: Source, numbers: range, seq_length: int, rows: int) -> tuple[Int64, Int64]:
    """Inputs and targets, int64 [rows, T]; rows and places with nothing to predict have target -100."""
    inputs = np.full((rows, seq_length), source.eos_id, dtype=np.int64)
    targets = np.full((rows, seq_length), -100, dtype=np.int64)
    for row, number in enumerate(numbers):
        start = number * seq_length
        length = min(seq_length, source.validation.tokens - start)
        targets[row, :length] = source.validation.read(start, length)
        inputs[row, 1:length] = targets[row, : length - 1]
        if start:
            inputs[row, 0] = source.validation.read(start - 1, 1)[0]
    return inputs, targets


def evaluate_sources(
    engine: Engine,
    ranks: Ranks,
    sources: Mapping[str, Source],
    *,
    seq_length: int,
    micro_batch_size: int,
    sequences: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, SourceLoss]:
    """`evaluate_source` for each source that has held-out documents, by name; the others are left out."""
    return {
        name: evaluate_source(
            engine,
            ranks,
            source,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            sequences=sequences,
            stop=stop,
        )
        for name, source in sources.items()
        if source.validation.tokens
    }


def sources_of(
    lineage: Lineage,
    named: Mapping[str, Source],
    opened: Iterable[Source] = (),
    cache: ShardCache | None = None,
    *,
    pass_over_unreachable: bool = False,
) -> tuple[dict[str, Source], list[str]]:
    """All that a model has seen, beside what a configuration names: sources by name, and what could not be opened.

    opened: sources that need not be opened again. cache: for those on a store. One that gives nothing for now is an
    UnreachableError, unless pass_over_unreachable makes it one of those that could not be opened.
    """
    found = dict(named)
    problems = []
    for record in lineage.sources.values():
        if record.fingerprint in {source.fingerprint for source in found.values()}:
            continue
        try:
            source = open_recorded(record, opened, cache)
        except DataError as error:
            if isinstance(error, UnreachableError) and not pass_over_unreachable:
                raise
            problems.append(str(error))
            continue
        name = record.name if record.name not in found else f"{record.name}-{record.fingerprint[:6]}"
        found[name] = source
    return found, problems


def open_named(folders: Sequence[str], tokenizer: Tokenizer, cache: ShardCache | None = None) -> dict[str, Source]:
    """Data folders by their sources' names, or by their paths where two have one name.

    Raises DataError where one was prepared with another tokenizer than the model's.
    """
    opened = [open_source(folder, cache=cache) for folder in folders]
    for source in opened:
        if not tokenizer.matches(source.tokenizer_fingerprint):
            raise DataError(f"{source.path}: prepared with another tokenizer than the model's; prepare it with that.")
    names = [source.name for source in opened]
    return {source.name if names.count(source.name) == 1 else source.path: source for source in opened}
