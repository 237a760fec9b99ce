"""What was evaluated on a model's way: the records of runs and of those that they started from, read back.

    evaluations = read_evaluations(Path("runs/german"))             # and of the runs that it started from
    loss_at(evaluations, "english"), rise(evaluations, "english"), curve(evaluations, "german")

Losses are on held-out documents, in nats a token or in bits per byte of text. Only files are read: metrics.jsonl,
config.yaml and lineage.json of each run of a chain, so that it can be done while a run is going on, and without torch.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megacl.configfile import load
from megacl.errors import CheckpointError, DataError
from megacl.lineage import ConversionRecord, PhaseRecord, VocabularyRecord, load_lineage, marks_of
from megacl.log import read_metrics

Unit = Literal["loss", "bits_per_byte"]
UNITS: tuple[Unit, ...] = ("loss", "bits_per_byte")
At = Literal["start", "interval", "end"]


# ---------------------------------------------------------------------------------------------- what was recorded


@dataclass(frozen=True)
class SourceLoss:
    """The held-out loss on one source. text_bytes is in proportion where only the first sequences were read."""

    loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float
    nats: float
    tokens: int
    text_bytes: float
    fingerprint: str
    """Of the source's data: its name may be another one in another run."""

    def record(self) -> dict[str, Any]:
        """The result as it stands in metrics.jsonl, where a number that is not finite becomes null."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Any) -> "SourceLoss":
        """The result back from metrics.jsonl, null being NaN. Raises ValueError, naming what is missing."""
        values = dict(record) if isinstance(record, dict) else {}
        for key in ("loss", "perplexity", "bits_per_byte", "nats", "tokens", "text_bytes"):
            value = values.get(key, "")
            if value is None:
                values[key] = math.nan
            elif not isinstance(value, int | float):
                raise ValueError(f"a number {key!r}")
        if not isinstance(values.get("fingerprint"), str):
            raise ValueError("a text 'fingerprint'")
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Evaluation:
    """The held-out losses of a model at one point of its way."""

    run: str
    """The run directory's name."""
    phase: str
    at: At
    """Where the run began, inside the phase, or at its end."""
    step: int
    """Optimizer steps of that run."""
    tokens: int
    """Tokens that the model had learned from, over all its history."""
    sources: Mapping[str, SourceLoss]

    @classmethod
    def from_record(cls, record: Mapping[str, Any], run: str) -> "Evaluation":
        """One of a metrics.jsonl's records of kind "evaluation". Raises ValueError, in words that follow "is"."""
        if not (isinstance(record.get("phase"), str) and record.get("at") in ("start", "interval", "end")):
            raise ValueError("an evaluation without 'phase' and 'at'")
        sources = record.get("sources")
        if not isinstance(sources, dict):
            raise ValueError("an evaluation without 'sources'")
        for key in ("step", "tokens"):
            if not isinstance(record.get(key), int):
                raise ValueError(f"an evaluation without a whole number {key!r}")
        try:
            measured = {name: SourceLoss.from_record(result) for name, result in sources.items()}
        except ValueError as missing:
            raise ValueError(f"an evaluation without {missing} for each source") from None
        return cls(run, record["phase"], record["at"], record["step"], record["tokens"], measured)


def read_evaluations(
    run_dir: Path, *, until: int | None = None, warn: Callable[[str], None] = lambda line: None
) -> list[Evaluation]:
    """What was evaluated on a model's way, oldest first: by the run, and by those that it started from, up to there.

    until: a step of the run, after which nothing is read. Sources go by the names that the last run gives them, found
    by their data's fingerprints. Evaluations of updates that were undone by going back to a checkpoint are left out.
    Where an earlier run is gone, the way begins with the next one's "start", and `warn` is told. Raises CheckpointError
    where run_dir holds no run, or a file of it is broken.
    """
    return _renamed(read_own_evaluations(run_dir, until), _read_ancestors(run_dir, warn))


def _read_ancestors(run_dir: Path, warn: Callable[[str], None]) -> Iterator[list[Evaluation]]:
    """The evaluations of the runs before, newest run first, each up to the checkpoint with which the next one began."""
    while (config := load([str(run_dir / "config.yaml")])).start_from is not None:
        lineage = load_lineage(run_dir)
        # A run that starts from another begins with a branch, behind which its vocabulary may grow, or is a merge.
        began = next(event for event in reversed(lineage.events) if not isinstance(event, VocabularyRecord))
        if isinstance(began, ConversionRecord):
            return  # from a model of other software, of which nothing was evaluated here
        mark = marks_of(began)[-1]
        parent = _parent_dir(run_dir, config.start_from, config.run_dir)
        try:
            same = _told_apart(load_lineage(parent).phases[: began.after]) == _told_apart(lineage.phases[: began.after])
            problem = "" if same else f"{parent}: it is not the run that {run_dir} started from"
            found = read_own_evaluations(parent, until=mark.step)
        except CheckpointError as error:
            problem = str(error).rstrip(".")
        if problem:
            warn(f"what was evaluated before {run_dir} is not known: {problem}.")
            return
        yield found
        run_dir = parent


def _told_apart(phases: Iterable[PhaseRecord]) -> list[tuple[Any, ...]]:
    """Of each phase what stays as it is from its beginning on."""
    return [(each.run, each.name, each.seed, tuple(source.fingerprint for source in each.sources)) for each in phases]


def _parent_dir(run_dir: Path, start_from: str, configured: str) -> Path:
    """The run directory that `start_from` means.

    A relative path is taken from the working directory in which `run_dir` was called `configured`, so that it is found
    from any other, and after both runs were moved together.
    """
    path = Path(start_from)
    if path.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", path.name):
        path = path.parent.parent
    elif "@" in start_from and not path.is_dir():
        path = Path(start_from.rpartition("@")[0])
    if path.is_absolute() and path.is_dir():
        return path
    return run_dir / os.path.relpath(path, configured)


def read_own_evaluations(run_dir: Path, until: int | None = None) -> list[Evaluation]:
    """One run's own evaluations, in order, without those that were undone; until: as in `read_evaluations`.

    Raises CheckpointError where run_dir holds no run, or its metrics.jsonl is broken.
    """
    path = run_dir / "metrics.jsonl"
    if not (run_dir / "config.yaml").is_file():
        raise CheckpointError(f"{run_dir}: no run directory, it has no config.yaml.")
    found: list[Evaluation] = []
    for line, record in enumerate(read_metrics(path), start=1):
        if until is not None and record.get("step", 0) > until:
            break
        if record.get("kind") == "go_back":
            back = record.get("to_step") or 0
            found = [each for each in found if each.step <= back]
        if record.get("kind") != "evaluation":
            continue
        try:
            found.append(Evaluation.from_record(record, run_dir.resolve().name))
        except ValueError as error:
            raise CheckpointError(f"{path}: line {line} is {error}; take that line out to go on.") from None
    return found


def _renamed(newest: list[Evaluation], older: Iterable[list[Evaluation]]) -> list[Evaluation]:
    """All evaluations, oldest first, under the names that the newest run gives the data; older: newer runs first."""
    known = {name: result.fingerprint for each in newest for name, result in each.sources.items()}
    way = newest
    for run in older:
        for each in run:
            for name, result in each.sources.items():
                if result.fingerprint not in known.values():
                    known[name if name not in known else f"{name}-{result.fingerprint[:6]}"] = result.fingerprint
        way = [dataclasses.replace(each, sources=_under(known, each.sources)) for each in run] + way
    return way


def _under(known: Mapping[str, str], sources: Mapping[str, SourceLoss]) -> dict[str, SourceLoss]:
    found = {result.fingerprint: result for result in sources.values()}
    return {name: found[fingerprint] for name, fingerprint in known.items() if fingerprint in found}


# ---------------------------------------------------------------------------------------------- one source's way


def loss_at(
    evaluations: Sequence[Evaluation],
    source: str,
    phase: str | None = None,
    at: At = "end",
    *,
    unit: Unit = "loss",
) -> float:
    """The last value recorded for a source at such a point, of one phase or of any. Raises DataError where none was."""
    for each in reversed(evaluations):
        if each.at == at and phase in (None, each.phase) and source in each.sources:
            return value_of(each.sources[source], unit)
    where = f"the {at} of phase {phase!r}" if phase else f"any {at}"
    raise DataError(f"source {source!r} was not evaluated at {where}; its name must be one of the run's `sources`.")


def rise(evaluations: Sequence[Evaluation], source: str) -> float:
    """How far the loss at the last phase's end lies above the best at earlier ends and starts; negative where below.

    Raises DataError where the source was not evaluated at two of them.
    """
    known = [each for each in evaluations if each.at != "interval" and source in each.sources]
    while known and known[-1].at == "start":
        known.pop()
    if len(known) < 2:
        raise DataError(f"source {source!r} was not evaluated at a phase's end and before; its rise needs both.")
    losses = [each.sources[source].loss for each in known]
    return losses[-1] - least(losses[:-1])


def bump(evaluations: Sequence[Evaluation], source: str, phase: str | None = None) -> float:
    """How far the highest loss inside a phase, its end included, lies above the one where the phase began.

    phase: by default the last one. Raises DataError where the source was not evaluated before the phase and in it.
    """
    known = [each for each in evaluations if source in each.sources]
    phase = phase or (known[-1].phase if known else None)
    inside = [number for number, each in enumerate(known) if each.phase == phase and each.at != "start"]
    if not inside or not inside[0]:
        raise DataError(f"source {source!r} was not evaluated both before phase {phase!r} and inside it.")
    losses = [each.sources[source].loss for each in known]
    return -least([-losses[number] for number in inside]) - losses[inside[0] - 1]


def curve(evaluations: Sequence[Evaluation], source: str, *, unit: Unit = "loss") -> list[tuple[int, float]]:
    """(tokens, loss) of a source on a model's way, a point for each number of tokens, ascending."""
    points = {each.tokens: value_of(each.sources[source], unit) for each in evaluations if source in each.sources}
    return sorted(points.items())


def value_of(result: SourceLoss, unit: Unit) -> float:
    """The loss in that unit."""
    return result.loss if unit == "loss" else result.bits_per_byte


def least(values: Sequence[float]) -> float:
    """The smallest value; NaN where one of them is."""
    return math.nan if any(map(math.isnan, values)) else min(values)
