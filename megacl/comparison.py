"""A run beside another one, a union run above all: at equal tokens, at equal compute, and at the other's end.

    megacl evaluate RUN --against UNION

    for line in compare(Path("runs/german"), Path("runs/union")).lines():
        print(line)

A union run learns old and new data together, from scratch; a continual one learns them in turn. No model is loaded:
both are known by what they recorded. A point on a model's way costs the tokens that it had learned from there, in
earlier runs too, and their compute: tokens x FLOPs per token of the model under the phase's sequence length (updates
that were skipped or undone are not counted). Between two evaluations the other run's losses lie on a straight line over
its tokens. Its rate was still high there, where the run's own has been decayed: a union planned for so few tokens would
be better.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacl.configfile import load
from megacl.errors import CheckpointError, DataError
from megacl.heldout import UNITS, SourceLoss, Unit, curve, read_evaluations
from megacl.lineage import load_lineage
from megacl.log import table_text
from megacl.model.gpt import flops_per_token

MEAN = "mean"


@dataclass(frozen=True)
class Point:
    """A model at one point of its way."""

    where: str
    tokens: float
    flops: float
    values: dict[Unit, dict[str, float | None]]
    """By unit and source, and the MEAN over sources; None where the recorded curve does not reach."""


@dataclass(frozen=True)
class Comparison:
    """Where a run stands, and the other run beside it."""

    run: str
    other: str
    last_phase: str
    """Of the run."""
    last_tokens: int
    """What it alone learned from."""
    points: tuple[Point, ...]
    """The run's latest evaluation first, then those of the other one."""
    units: tuple[Unit, ...]
    """Those in which the two can be compared: with unlike tokenizers, bits per byte alone."""
    notes: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """The comparison as text: a table a unit."""
        ours, *others = self.points
        yield (
            f"{self.run} has learned from {ours.tokens:,.0f} tokens, {self.last_tokens:,} of them in its last phase, "
            f"{self.last_phase}"
        )
        yield from (f"note: {note}" for note in self.notes)
        for unit in self.units:
            name = "nats a token" if unit == "loss" else "bits per byte of text"
            yield f"\nheld-out loss, {name}; in brackets: how far {self.run} lies above it"
            own = ours.values[unit]
            rows = [_row(ours, [_number(value) for value in own.values()])]
            for point in others:
                found = point.values[unit]
                rows.append(_row(point, [_beside(found[source], own[source]) for source in own]))
            yield from table_text(["", "tokens", "FLOPs", *own], rows)


def _row(point: Point, cells: list[str]) -> list[str]:
    return [point.where, f"{point.tokens:,.0f}", f"{point.flops:.3g}", *cells]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _beside(value: float | None, ours: float | None) -> str:
    return _number(value) if value is None or ours is None else f"{value:.4f} ({ours - value:+.4f})"


class _Way:
    """A run with all that went before it."""

    def __init__(self, run_dir: Path, warn: Callable[[str], None]) -> None:
        if not (run_dir / "config.yaml").is_file() or not (run_dir / "metrics.jsonl").is_file():
            raise CheckpointError(
                f"{run_dir}: no run directory; a comparison is of what two runs recorded, so give their run_dirs, "
                "not a checkpoint or RUN@STEP."
            )
        self.name = run_dir.resolve().name
        self.evaluations = read_evaluations(run_dir, warn=warn)
        self.phases = load_lineage(run_dir).phases
        if not (self.evaluations and self.phases):
            raise DataError(f"{run_dir}: nothing has been evaluated there yet; wait until its first phase has begun.")
        self.sources = self.evaluations[-1].sources
        model = load([str(run_dir / "config.yaml")]).model
        tokens = [phase.tokens for phase in self.phases]
        tokens[-1] += max(self.evaluations[-1].tokens - sum(tokens), 0)  # the lineage is as of the last checkpoint
        each = [flops_per_token(model, phase.seq_length) for phase in self.phases]
        self.flops_per_token = each[-1]
        self.tokens = np.cumsum([0, *tokens], dtype=np.float64)
        self.flops = np.cumsum([0, *np.multiply(tokens, each, dtype=np.float64)])

    def flops_at(self, tokens: float) -> float:
        return float(np.interp(tokens, self.tokens, self.flops))

    def tokens_for(self, flops: float) -> float:
        """With how many tokens the way has cost so much, or will have if it goes on as it ends."""
        beyond = (flops - self.flops[-1]) / self.flops_per_token
        return float(self.tokens[-1] + beyond if beyond > 0 else np.interp(flops, self.flops, self.tokens))

    def point(self, where: str, tokens: float, names: Mapping[str, str]) -> Point:
        """The point after so many tokens; names: the common name of a source -> this way's own."""
        values: dict[Unit, dict[str, float | None]] = {}
        for unit in UNITS:
            found = {name: self._value(own, tokens, unit) for name, own in names.items()}
            known = [value for value in found.values() if value is not None]
            values[unit] = {**found, MEAN: sum(known) / len(known) if len(known) == len(found) else None}
        return Point(where, tokens, self.flops_at(tokens), values)

    def _value(self, source: str, tokens: float, unit: Unit) -> float | None:
        at, losses = zip(*curve(self.evaluations, source, unit=unit), strict=True)
        return float(np.interp(tokens, at, losses)) if at[0] <= tokens <= at[-1] else None


def compare(run_dir: Path, other_dir: Path, warn: Callable[[str], None] = lambda line: None) -> Comparison:
    """The run at its latest evaluation, and the other run at as many tokens, at as much compute, and at its own latest.

    Raises CheckpointError where one of them is no run, DataError where nothing was evaluated or no source of both.
    """
    ours, theirs = _Way(run_dir, warn), _Way(other_dir, warn)
    names = _common(ours.sources, theirs.sources)
    if not names:
        raise DataError(
            f"{run_dir} and {other_dir} have no evaluated source in common, by their data or by name; "
            "give the same text the same name in the `sources` of both."
        )
    tokens, end = float(ours.evaluations[-1].tokens), float(theirs.evaluations[-1].tokens)
    compute = theirs.tokens_for(ours.flops_at(tokens))
    asked = {"equal tokens": tokens, "equal compute": compute}
    if abs(compute - tokens) < 1e-3 * tokens:
        asked = {"equal tokens and compute": tokens}
    same_tokenizer = ours.phases[-1].tokenizer == theirs.phases[-1].tokenizer
    notes = [f"{theirs.name} does not reach {where}" for where, place in asked.items() if place > end]
    if not same_tokenizer:
        notes.append("the runs have unlike tokenizers, so that their tokens are too: only bits per byte compare")
    notes += _unlike(ours.sources, theirs.sources, names, same_tokenizer)
    return Comparison(
        run=ours.name,
        other=theirs.name,
        last_phase=ours.phases[-1].name,
        last_tokens=ours.phases[-1].tokens,
        points=(
            ours.point(ours.name, tokens, {name: name for name in names}),
            *(theirs.point(f"{theirs.name}, {where}", place, names) for where, place in asked.items() if place <= end),
            theirs.point(f"{theirs.name}, at its end", end, names),
        ),
        units=UNITS if same_tokenizer else ("bits_per_byte",),
        notes=tuple(notes),
    )


def _common(ours: Mapping[str, SourceLoss], theirs: Mapping[str, SourceLoss]) -> dict[str, str]:
    """Sources of both: our name -> theirs, of the same data or else of the same name."""
    by_data = {result.fingerprint: name for name, result in theirs.items()}
    found = {name: by_data.get(result.fingerprint, name) for name, result in ours.items()}
    return {name: other for name, other in found.items() if other in theirs}


def _unlike(
    ours: Mapping[str, SourceLoss], theirs: Mapping[str, SourceLoss], names: Mapping[str, str], same_tokenizer: bool
) -> Iterator[str]:
    """A line for each source that was evaluated on other text in the two runs, as far as their records show."""
    for name, other in names.items():
        here, there = ours[name], theirs[other]
        if same_tokenizer and here.fingerprint != there.fingerprint:
            yield f"source {name} is other data in the two runs; its held-out documents may differ"
        elif abs(here.text_bytes - there.text_bytes) > 1e-3 * there.text_bytes:
            yield (
                f"source {name} was evaluated on {here.text_bytes:,.0f} bytes of text here and "
                f"{there.text_bytes:,.0f} there; set evaluation.sequences so that both read the same"
            )
