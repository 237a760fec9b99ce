"""The metrics of continual learning: a matrix of losses, phases x sources, and what was forgotten, kept and learned.

    matrix = read_matrix(Path("runs/german"))                            # or unit="bits_per_byte"
    matrix.forgetting("english"), matrix.scores().retained

L[t, s] is the held-out loss on source s behind phase t, in nats a token or in bits per byte of text; t = 0 is the model
before any training. A phase's own sources are those that its mixture reads, as its lineage says; what it replays is not
its own. All quantities are of one row t, the last one unless another is asked for:

    forgetting(s)         max(L[t, s] - min over r < t of L[r, s], 0)
    learned(s)            L[u, s], u <= t being the last phase that s is an own source of
    retained(s)           L[t, s] where s is an own source of an earlier phase, and not of phase t
    backward_transfer(s)  learned(s) - retained(s): positive where later phases made an earlier phase's source better
    forward_transfer(s)   L[0, s] - L[f - 1, s], f >= 2 being the first phase that s is an own source of: positive where
                          earlier phases made a source better before it was read

`scores` are means over sources: the learned loss over phase t's own; retained loss, forgetting and backward transfer
over those of earlier phases; forward transfer over all that have one. Forgetting, retained and learned loss are what
Abbes et al. 2025, arXiv 2508.01908, report; the formulas are ours. The transfers are those of Lopez-Paz & Ranzato 2017,
arXiv 1706.08840, with -L in place of the accuracy R, so that positive is good:
BWT = mean over i < T of R[T, i] - R[i, i], FWT = mean over i >= 2 of R[i - 1, i] - R[0, i].
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megacl.heldout import Evaluation, Unit, least, read_evaluations, value_of
from megacl.lineage import Lineage, MergeRecord, PhaseRecord, load_lineage

UNTRAINED = "before"
"""The label of row 0."""


@dataclass(frozen=True)
class Row:
    """A row of the matrix: the held-out losses behind one phase or merge."""

    label: str
    """The phase's or the merge's name, or UNTRAINED."""
    tokens: int
    """Tokens that the model had learned from there."""
    under_way: int | None
    """The run's step at which the phase was evaluated last, where it had not ended."""
    own: frozenset[str]
    values: Mapping[str, float]
    """By source; none where nothing of it is known."""


@dataclass(frozen=True)
class Scores:
    """Means over sources, each None where no source has that quantity."""

    learned: float | None
    retained: float | None
    forgetting: float | None
    backward: float | None
    forward: float | None


@dataclass(frozen=True)
class Matrix:
    """Held-out losses of one model, phases x sources; `row` counts from 0, or backwards from -1, the last one."""

    unit: Unit
    rows: tuple[Row, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """All that were evaluated, in the order in which they first appear."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.values))

    def forgetting(self, source: str, row: int = -1) -> float | None:
        """How far the loss lies above the best in an earlier row; 0 where it does not. None: there are no two."""
        now = self.rows[row].values.get(source)
        earlier = self._values(source, self._before(row))
        if now is None or not earlier:
            return None
        return max(now - least(earlier), 0.0)  # in this order, a NaN stays one

    def learned(self, source: str, row: int = -1) -> float | None:
        """The loss at the end of the last phase that had it as its own. None: no phase had, or it was not evaluated."""
        own = [each for each in (*self._before(row), self.rows[row]) if source in each.own]
        return own[-1].values.get(source) if own else None

    def retained(self, source: str, row: int = -1) -> float | None:
        """The loss of a source of earlier phases; None where it is not one, or is the row's own again."""
        if source in self.rows[row].own or not any(source in each.own for each in self._before(row)):
            return None
        return self.rows[row].values.get(source)

    def backward_transfer(self, source: str, row: int = -1) -> float | None:
        """How far later phases brought a source's loss below the one at its own phase's end: negative if above."""
        learned, retained = self.learned(source, row), self.retained(source, row)
        return None if learned is None or retained is None else learned - retained

    def forward_transfer(self, source: str, row: int = -1) -> float | None:
        """How far earlier phases brought a source's loss below the untrained model's, before a phase first read it."""
        rows = (*self._before(row), self.rows[row])
        first = next((number for number, each in enumerate(rows) if source in each.own), 0)
        if first < 2 or rows[0].label != UNTRAINED:
            return None
        untrained, before = rows[0].values.get(source), rows[first - 1].values.get(source)
        return None if untrained is None or before is None else untrained - before

    def scores(self, row: int = -1) -> Scores:
        """The means over sources."""
        own = [source for source in self.sources if source in self.rows[row].own]
        earlier = [source for source in self.sources if self.retained(source, row) is not None]
        return Scores(
            learned=_mean(self.learned(source, row) for source in own),
            retained=_mean(self.retained(source, row) for source in earlier),
            forgetting=_mean(self.forgetting(source, row) for source in earlier),
            backward=_mean(self.backward_transfer(source, row) for source in earlier),
            forward=_mean(self.forward_transfer(source, row) for source in self.sources),
        )

    def record(self) -> dict[str, Any]:
        """The matrix with all that follows from it, for JSON; None where a quantity is not defined."""
        return {
            "phases": [
                {**asdict(row), "own": sorted(row.own), "scores": asdict(self.scores(number))}
                for number, row in enumerate(self.rows)
            ],
            "sources": {
                source: {
                    "learned": self.learned(source),
                    "retained": self.retained(source),
                    "forgetting": self.forgetting(source),
                    "backward": self.backward_transfer(source),
                    "forward": self.forward_transfer(source),
                }
                for source in self.sources
            },
        }

    def _before(self, row: int) -> tuple[Row, ...]:
        return self.rows[: range(len(self.rows))[row]]

    def _values(self, source: str, rows: Sequence[Row]) -> list[float]:
        return [each.values[source] for each in rows if source in each.values]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def read_matrix(
    run_dir: Path,
    *,
    unit: Unit = "loss",
    until: int | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Matrix:
    """The matrix of a run and of those that it started from, as of its step `until` if that is given.

    Raises as `read_evaluations` does, which says what `warn` is told.
    """
    return matrix_of(read_evaluations(run_dir, until=until, warn=warn), load_lineage(run_dir), unit=unit)


def matrix_of(evaluations: Iterable[Evaluation], lineage: Lineage, *, unit: Unit = "loss") -> Matrix:
    """The matrix of what was evaluated on a model's way.

    A row is the end of a phase, or the latest evaluation of one that has not ended; and a model that was merged, which
    read nothing. Rows stand in the order of the lineage. Where a run goes on from another, its "start" is of the same
    model as the row before, which gains what only the new run evaluates.
    """
    phases = {phase.name: phase for phase in lineage.phases}
    order = [entry.name for entry in lineage.entries if isinstance(entry, PhaseRecord | MergeRecord)]
    latest: dict[str, Evaluation] = {}
    for each in evaluations:
        label = _label(each, order, latest)
        known = latest.get(label, each)
        if each.at == "start" and known.at == "end":
            latest[label] = dataclasses.replace(known, sources={**each.sources, **known.sources})
        else:
            latest[label] = dataclasses.replace(each, sources={**known.sources, **each.sources})
    names = {name: result.fingerprint for each in latest.values() for name, result in each.sources.items()}

    labels = order[: max((order.index(label) + 1 for label in latest if label in order), default=0)]
    labels = [UNTRAINED] * (UNTRAINED in latest) + labels
    rows, tokens = [], 0
    for label in labels:
        tokens += phases[label].tokens if label in phases else 0
        read = {each.fingerprint for each in phases[label].sources if each.samples} if label in phases else set()
        found = latest.get(label)
        rows.append(
            Row(
                label=label,
                tokens=found.tokens if found else tokens,
                under_way=found.step if found and found.at == "interval" else None,
                own=frozenset(name for name, fingerprint in names.items() if fingerprint in read),
                values={name: value_of(result, unit) for name, result in found.sources.items()} if found else {},
            )
        )
    return Matrix(unit, tuple(rows))


def _label(evaluation: Evaluation, order: Sequence[str], latest: Mapping[str, Evaluation]) -> str:
    """Whose row an evaluation belongs to; order: of phases and merges. latest: what the rows hold so far."""
    if evaluation.at != "start":
        return evaluation.phase
    if latest and [*latest.values()][-1].tokens == evaluation.tokens:
        return [*latest][-1]
    number = order.index(evaluation.phase) if evaluation.phase in order else len(order)
    return order[number - 1] if number else UNTRAINED


def matrix_table(
    matrix: Matrix, write: Callable[[float | None, bool], str], sources: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of a matrix as text: a row a phase with its scores, its own sources starred; then a row a quantity.

    write: a value, and whether it is a difference, as text. sources: the columns, in order.
    """
    head = ["", *sources, "learned", "retained", "forgetting", "backward", "forward"]
    rows = []
    for number, row in enumerate(matrix.rows):
        scores = matrix.scores(number)
        rows.append(
            [
                row.label if row.under_way is None else f"{row.label}, step {row.under_way:,}",
                *(write(row.values.get(each), False) + "*" * (each in row.own) for each in sources),
                *(write(each, False) for each in (scores.learned, scores.retained)),
                *(write(each, True) for each in (scores.forgetting, scores.backward, scores.forward)),
            ]
        )
    quantities: dict[str, Callable[[str], float | None]] = {
        "learned": matrix.learned,
        "forgetting": matrix.forgetting,
        "backward": matrix.backward_transfer,
        "forward": matrix.forward_transfer,
    }
    for name, quantity in quantities.items():
        rows.append([name, *(write(quantity(each), name != "learned") for each in sources), *[""] * 5])
    return head, rows
